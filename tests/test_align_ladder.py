"""`cs336 align ladder`: rungs whose questions, imitations and optima are what they say, and that are climbed."""

import json
import random

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.end_to_end import bench_align_ladder
from cs336.align_ladder import BATCH, RUNGS, TESTED, AlignLadder, _Job, align_ladder, nearly, sums
from cs336.alignment.rewards import Rewards
from cs336.cli.program import main
from cs336.utils.stages import run_stages

BEST = {
    "bandit": lambda question, answer: max(answer, key=answer.get),
    "sorting": lambda question, answer: "".join(sorted(question[:-1])),
    "addition": lambda question, answer: f"{sum(map(int, question[:-1].split('+'))):03}",
}


def _unordered(question):
    numbers, _, target = question.partition(":")
    return *sorted(numbers.split(",")), target


@pytest.mark.parametrize("name", RUNGS)
def test_the_best_answers_are_worth_the_optimum_and_imitated_ones_less(name):
    rung, rng = RUNGS[name], random.Random(5)
    questions, rewards = rung.questions(rng), Rewards(rung.rewards)
    if best := BEST.get(name.removesuffix("-ppo")):
        assert {rewards(best(question, answer), answer) for question, answer in questions} == {rung.optimum}
    imitated = [rewards(rung.imitated(rng, question), answer) for question, answer in questions for _ in range(3)]
    assert 0 <= sum(imitated) / len(imitated) < 0.6
    assert rung.questions(random.Random(6)) == rung.questions(random.Random(6)) != questions
    longest = max(len(rung.imitated(rng, question)) for question, _ in questions)
    assert rung.max_tokens in (longest, longest + 1)  # the end of a text is a token too


@pytest.mark.parametrize("name", ["sorting", "addition", "countdown"])
def test_what_is_tested_is_not_learned_from(name):
    questions = [question for question, _ in RUNGS[name].questions(random.Random(0))]
    assert len(set(questions)) == len(questions) > 500
    assert len(set(map(_unordered, questions))) == len(questions)  # in no other order either


def test_no_sum_that_is_tested_is_learned_with_its_numbers_swapped():
    pairs = sums(random.Random(3))
    assert sorted(pairs) == [(a, b) for a in range(10, 100) for b in range(10, 100)]
    learned, tested = set(pairs[:-TESTED]), set(pairs[-TESTED:])
    assert not {(b, a) for a, b in tested} & learned
    assert pairs[:-TESTED] != sorted(learned)


def test_countdown_can_be_solved():
    """By an expression of the kind that is imitated, for every question."""
    rung, rng = RUNGS["countdown"], random.Random(1)
    for question, answer in rng.sample(rung.questions(rng), 40):
        assert any(Rewards(rung.rewards)(rung.imitated(rng, question), answer) for _ in range(2000)), question


def test_nearly_right_sums():
    drawn = [nearly(random.Random(i), 47, 68) for i in range(4000)]
    assert set(drawn) == {"115", "116", "125", "126"}
    assert drawn.count("115") / 4000 == pytest.approx(0.09, abs=0.02)


def test_the_bandits_are_solved_by_grpo_and_by_ppo(tmp_path, capsys):
    assert main(["align", "ladder", "bandit", "bandit-ppo", "--run-dir", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for name, algorithm in (("bandit", "grpo"), ("bandit-ppo", "ppo")):
        row = json.loads((tmp_path / name / "result.json").read_text())
        assert (row["rung"], row["algorithm"], row["optimum"], row["seed"]) == (name, algorithm, 1.0, 0)
        assert row["start"] < 0.6
        assert row["end"] > 0.95
        assert row["cpu_seconds"] > 0
        assert (tmp_path / name / algorithm / "report.html").exists()
        assert f"{name} " in table
    before = (tmp_path / "bandit" / "result.json").stat().st_mtime_ns
    assert main(["align", "ladder", "bandit", "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("(done before)") == 4
    assert (tmp_path / "bandit" / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["sorting", "addition", "countdown"])
def test_each_rung_runs_for_a_few_steps(tmp_path, name):
    (row,) = align_ladder(AlignLadder((name,), tmp_path, share=0.01, seed=1))
    assert (row["rung"], row["seed"]) == (name, 1)
    learned, tested = (
        {json.loads(line)["prompt"] for line in (tmp_path / name / "data" / f"{kind}.jsonl").open()}
        for kind in ("learned", "tested")
    )
    imitated = {json.loads(line)["prompt"] for line in (tmp_path / name / "data" / "sft.jsonl").open()}
    assert imitated == learned
    assert not learned & tested
    assert row["questions"] == len(tested) == min(TESTED, (len(learned) + len(tested)) // 4)
    assert not set(map(_unordered, learned)) & set(map(_unordered, tested))
    assert 0 <= row["start"] < 0.5
    assert 0 <= row["end"] <= row["optimum"] == 1


def test_another_share_of_the_steps_has_its_own_number_of_examples(tmp_path):
    for share, steps in ((0.1, 2), (1.0, 20)):
        job = _Job("bandit", AlignLadder(("bandit",), tmp_path, share=share), Console(quiet=True))
        run_stages(job.run_dir, job.stages()[:1], job.console)
        examples = (tmp_path / "bandit" / "data" / "sft.jsonl").read_text().splitlines()
        assert len(examples) == BATCH * steps


def test_the_benchmark_keeps_a_row_a_seed(tmp_path):
    out = tmp_path / "cpu.json"
    command = ["bandit", "--seeds", "0", "1", "--share", "0.05", "--run-dir", str(tmp_path), "--out", str(out)]
    assert bench_align_ladder.main(command) == 0
    run = json.loads(out.read_text())["align_ladder"]
    assert run["header"]["command"].endswith("bench_align_ladder bandit --seeds 0 1")
    assert [(row["rung"], row["seed"]) for row in run["rows"]] == [("bandit", 0), ("bandit", 1)]
    (other,) = align_ladder(AlignLadder(("bandit-ppo",), tmp_path / "other", 0.05))
    bench_align_ladder.write(out, [other, run["rows"][1] | {"end": 0.5}])
    kept = json.loads(out.read_text())["align_ladder"]["rows"]
    assert [(row["rung"], row["seed"]) for row in kept] == [("bandit", 0), ("bandit", 1), ("bandit-ppo", 0)]
    assert (kept[0], kept[1]["end"]) == (run["rows"][0], 0.5)
    heads, _, row = report.align_ladder(run["rows"])
    assert heads.count("|") == row.count("|")
    assert row.startswith("| bandit | grpo | ")


def test_settings_that_are_none():
    with pytest.raises(ValueError, match="chess: the rungs are bandit, bandit-ppo, sorting, addition, countdown"):
        AlignLadder(("chess",))
    with pytest.raises(ValueError, match="share must be above 0"):
        AlignLadder(share=0)
