"""What is done with a model: `cs336 generate`, `compare-hf`, `report`, `model info`."""

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import (
    Device,
    Draft,
    Late,
    MaybePath,
    Model,
    ModelTokenizer,
    Path,
    Run,
    TextField,
    WeightType,
    check_output,
    warnings_after,
    weight_dtype,
)
from cs336.utils.documents import TEXT_FIELD, read_texts
from cs336.utils.terminal import visible

MOST_DOCUMENTS, MOST_CHARS = 100, 200_000  # of text to compare on: more than a context holds
RunDirs = Annotated[tuple[Path, ...], arg(metavar="RUN_DIR [RUN_DIR ...]", help_behavior_hint="")]


@Late
def generate(arguments: list[str]) -> Run:
    """Continue a prompt with a trained model, as it is written."""
    import torch

    from cs336.inference import LLM, BeamParams, SamplingParams, beam_search, stream
    from cs336.inference import generate as continue_all
    from cs336.inference.load import find_model, load_model, load_tokenizer
    from cs336.inference.outputs import warn_if_cut
    from cs336.tokenizer import convert

    def run(
        model: Model,
        prompt: str = "",
        num_samples: int = 1,
        tokenizer: ModelTokenizer = None,
        draft: Draft = None,
        device: Device = "auto",
        dtype: WeightType = "auto",
        beams: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        sampling: Annotated[SamplingParams, arg(name="")] = SamplingParams(),  # noqa: B008 (frozen)
    ) -> None:
        """
        Args:
            prompt: text to continue; - reads it from standard input, an empty one begins a document.
            num_samples: continue it so many times, with a line between; with --seed, by that seed and those after it.
            beams: draw nothing, and write the likeliest text that keeping the best so many at each token finds; with
                --num-samples the best so many.
            length_penalty: of beams: they are compared by log-probability over length to this power.
            early_stopping: of beams: end once so many texts have ended, whether or not others could be better.
        """
        if beams is None and (length_penalty != 1 or early_stopping):
            raise ValueError("--length-penalty and --early-stopping are of beam search: give --beams N as well")
        search = None if beams is None else BeamParams(beams, sampling.max_tokens, length_penalty, early_stopping)
        drawing = [f.name for f in dataclasses.fields(sampling) if getattr(sampling, f.name) != f.default]
        drawing = [name for name in drawing if name != "max_tokens"] + (["draft"] if draft is not None else [])
        if search is not None and drawing:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in drawing)
            raise ValueError(f"--beams keeps the likeliest texts and draws none: leave out {named}")
        found, kind = find_model(model), weight_dtype(dtype)
        draft = None if draft is None else find_model(draft)  # before the model is read, not after it
        loaded = load_tokenizer(found) if tokenizer is None else convert.load(tokenizer)
        prompt = sys.stdin.read() if prompt == "-" else prompt
        torch.seed()  # without --seed every run is another

        def samples() -> Iterator[Iterator[str]]:
            """The pieces of each."""
            longest = max(1, len(loaded.encode_prompt(prompt))) + sampling.max_tokens
            network = load_model(found, device, kind, longest)
            if draft is not None or sampling.grammar is not None:
                llm = LLM(network, loaded, draft=draft, quiet=True, max_seqs=max(1, num_samples))
                if num_samples == 1:
                    yield llm.stream(prompt, sampling)
                    return
                (output,) = llm.generate(prompt, dataclasses.replace(sampling, n=num_samples))
                yield from texts(output.outputs, llm.engine.max_len)
                return
            if search is None and num_samples == 1:
                yield stream(network, loaded, prompt, sampling)
                return
            if search is None:
                completions = continue_all(network, loaded, prompt, sampling, num_samples=num_samples)
            else:
                completions = beam_search(network, loaded, prompt, search, num_samples=num_samples)
            if dropped := completions[0].dropped:
                warnings.warn(f"the first {dropped} tokens of the prompt are not read", stacklevel=1)
            yield from texts(completions, network.config.context_length)

        def texts(completions: Sequence[Any], max_len: int) -> Iterator[Iterator[str]]:
            if cut := [len(c.token_ids) for c in completions if c.finish_reason == "length"]:
                warn_if_cut(min(cut), sampling.max_tokens, max_len)
            return (iter([completion.text]) for completion in completions)

        shown = visible if sys.stdout.isatty() else str
        for number, pieces in enumerate(samples()):
            # Together: a prompt that is refused is not written.
            print(shown(prompt + next(pieces, "")), end="", flush=True)
            with warnings_after():
                for piece in pieces:
                    print(shown(piece), end="", flush=True)
                print(end="\n\n" if number + 1 < num_samples else "\n", flush=True)

    return run


def compare_hf(
    model: Positional[Path],
    text: tuple[Path, ...],
    text_field: TextField = TEXT_FIELD,
    device: Device = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    new_tokens: int = 64,
) -> None:
    """A model beside transformers' reading of the same files: likelihoods, greedy tokens, the worst difference.

    Args:
        model: a directory in the Hugging Face layout, or a finished run.
        text: files or directories of text, JSON lines or parquet; read until the model's context is full.
        dtype: that both compute in.
        new_tokens: continued greedily from the first half of the text.
    """
    from cs336.inference.compare import compare_huggingface
    from cs336.inference.load import find_model

    documents = itertools.islice(read_texts(text, text_field=text_field), MOST_DOCUMENTS)
    read, kind = "\n".join(documents)[:MOST_CHARS], weight_dtype(dtype)
    print(compare_huggingface(find_model(model), read, device, dtype=kind, new_tokens=new_tokens))


def info(
    model: Positional[Path],
    batch_size: int = 1,
    device: str = "auto",
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
) -> None:
    """What each layer of a model takes: parameters, FLOPs, activation and state bytes, and the roofline of a forward
    pass over batch_size sequences of its whole context on a device.

    Args:
        model: a TOML file with [model] or its fields, a GGUF file, an export, a checkpoint or a run directory.
        batch_size: sequences of the forward pass whose time is told.
        device: auto (a GPU if there is one), cpu, cuda. Its FLOP/s and bandwidth are the roofs.
        dtype: of the weights, the activations and the state.
    """
    import torch

    from cs336.inference.load import read_config
    from cs336.models.info import table
    from cs336.utils.device import peak_bandwidth, peak_flops, pick

    config, kind = read_config(model), getattr(torch, dtype)
    where = pick(device)
    flops, bandwidth = peak_flops(where, kind), peak_bandwidth(where)
    print(table(config, width=kind.itemsize, batch_size=batch_size, peak_flops=flops, bandwidth=bandwidth))
    shape = f"{batch_size} x {config.context_length:,} tokens in {dtype}"
    if flops and bandwidth:
        print(f"forward of {shape} on {where}: roofs {flops / 1e12:,.2f} TFLOP/s, {bandwidth / 1e9:,.1f} GB/s")
    else:
        print(f"forward of {shape}; the roofs of {where} are not known here")


def report(run_dirs: Positional[RunDirs], output: MaybePath = None) -> None:
    """Write a run directory's report.html, or one page that compares several.

    Args:
        run_dirs: of training runs, finished or not.
        output: the page. None: report.html in the one run directory, comparison.html here of several.
    """
    from cs336.report import write_comparison, write_report

    if not run_dirs:
        raise ValueError("there is nothing to report: name a run directory")
    if len(run_dirs) == 1:
        check_output(output)
        print(write_report(run_dirs[0], output))
    else:
        check_output(page := output or Path("comparison.html"))
        print(write_comparison(run_dirs, page))
