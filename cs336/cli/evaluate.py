"""`cs336 evaluate`: a model on text, and on tasks."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from tyro.conf import arg

from cs336.cli.common import Device, Late, MaybePath, Model, ModelTokenizer, Path, Paths, Run, TextField, check_output
from cs336.utils.documents import TEXT_FIELD, read_texts

Tasks = Annotated[tuple[str, ...], arg(metavar="[TASK ...]", help_behavior_hint="")]


@Late
def evaluate(arguments: list[str]) -> Run:
    """Loss and bits per byte of a model on text, beside what needs no neural network; with --tasks its scores on
    questions, choices, programs, instructions and refusals. Writes evaluation.json and results.json."""
    from cs336.evaluation import MOST_TOKENS

    def run(
        model: Model,
        text: Paths = (),
        text_field: TextField = TEXT_FIELD,
        tokenizer: ModelTokenizer = None,
        device: Device = "auto",
        max_tokens: int = MOST_TOKENS,
        tasks: Tasks = (),
        shots: int = 0,
        limit: int | None = None,
        samples: int = 1,
        temperature: float | None = None,
        new_tokens: int | None = None,
        chat: bool = False,
        seed: int = 0,
        judge: str | None = None,
        judge_model: str = "default",
        contamination: Paths = (),
        algebra: bool = False,
        weak_sandbox: bool = False,
        output: MaybePath = None,
    ) -> None:
        """
        Args:
            text: files or directories of text, JSON lines or parquet; the run's own validation data if there are none.
            max_tokens: of text, read about no more than this, spread evenly over it.
            tasks: KIND:FILE or TOML files; kinds are choice, mmlu, continuation, text, gsm8k, math, mbpp, humaneval,
                ifeval, refusal and pairs. Text is not measured then, unless it is named.
            shots: examples before each question.
            limit: ask no more questions of a task than this.
            samples: answers to each question; pass@k is told for k up to it.
            temperature: 0 for one sample and 0.8 for several if not given.
            new_tokens: of an answer at most.
            chat: ask by the model's chat template.
            seed: of examples and samples.
            judge: of pairs: the address of an OpenAI-compatible server, http://host:port/v1, or a model's directory.
            judge_model: what the server calls its model.
            contamination: training text; items that share 13 words in a row with it are told, and left out of a second
                mean.
            algebra: count answers of mathematics that are equal by algebra, which takes math-verify.
            weak_sandbox: run programs where there are no namespaces, behind Landlock alone.
            output: where prompts, answers and scores of tasks are written; results.json if not given.
        """
        place = Path("results.json") if output is None else output
        if tasks:
            check_output(place)
        else:
            _refuse_without_tasks(
                run, shots=shots, limit=limit, samples=samples, temperature=temperature, new_tokens=new_tokens,
                chat=chat, seed=seed, judge=judge, judge_model=judge_model, contamination=contamination,
                algebra=algebra, weak_sandbox=weak_sandbox, output=output,
            )  # fmt: skip
        if text or not tasks:
            _on_text(model, text, text_field, tokenizer, device, max_tokens)
        if not tasks:
            return
        from cs336.evaluation.tasks import Options, read_task, run_tasks, save_results
        from cs336.inference import LLM
        from cs336.verifiers.judge import judge_from

        preference = None if judge is None else judge_from(judge, judge_model).preference
        options = Options(samples, temperature, new_tokens, chat, seed, weak_sandbox, algebra, preference)
        read = [read_task(spec, limit) for spec in tasks]
        training = read_texts(contamination, text_field=text_field) if contamination else None
        llm = LLM(model, tokenizer, device=device)
        results = run_tasks(llm, read, options, shots=shots, training_text=training)
        for result in results:
            for name, metric in result.metrics.items():
                print(f"{result.task:<24}{name:<20}{metric}  ({metric.count})")
            if result.contaminated is not None:
                print(f"{result.task:<24}{'contaminated':<20}{len(result.contaminated)} of {len(result.rows)}")
            for name, metric in result.clean.items():
                print(f"{result.task:<24}{name + ', clean':<20}{metric}  ({metric.count})")
        asked = {"chat": chat, "samples": samples, "temperature": temperature, "seed": seed}
        print(save_results(place, results, model=str(model), **asked))

    return run


def _refuse_without_tasks(run: Callable[..., None], **options: Any) -> None:
    """Raises ValueError for those that are given and would change nothing."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(run).parameters.items()}
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value != defaults[name]]:
        raise ValueError(f"{', '.join(given)}: of tasks alone: name --tasks, or leave it out")


def _on_text(model: Path, text: Paths, text_field: str, tokenizer: MaybePath, device: str, max_tokens: int) -> None:
    from cs336.evaluation import evaluate_saved

    documents = read_texts(text, text_field=text_field) if text else None
    name = ", ".join(map(str, text))
    found, place = evaluate_saved(
        model, documents, text=name, tokenizer=tokenizer, device=device, most_tokens=max_tokens
    )
    print(f"loss {found.loss:.4f} nats per token\nbits per byte")
    rows = [("this model", found.bits_per_byte, found.how)]
    rows += [(b.name, b.bits_per_byte, b.how) for b in found.baselines]
    for label, bits, how in sorted(rows, key=lambda row: row[1]):
        print(f"{bits:7.3f}  {label:<14}{how}")
    print(found.save(place))
