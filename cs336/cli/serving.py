"""`cs336 serve`, `cs336 chat`, and `cs336 bench serve|offline|latency`."""

import os
import sys
from typing import Annotated, Literal

from tyro.conf import arg

from cs336.cli.common import (
    OPTIONS,
    Device,
    Draft,
    Late,
    Model,
    ModelTokenizer,
    Run,
    WeightType,
    warnings_after,
    weight_dtype,
)
from cs336.utils.terminal import visible

# Names of cs336.inference, which takes a second to import.
ToolParserName = Literal[
    "hermes", "qwen3_coder", "glm45", "llama3_json", "pythonic", "olmo3", "mistral", "mistral_args", "deepseek_v3",
    "deepseek_v31", "granite", "cohere", "gpt_oss",
]  # fmt: skip
ReasoningParserName = Literal["gpt_oss", "think", "granite", "mistral", "cohere", "none"]


@Late
def serve(arguments: list[str]) -> Run:
    """A model behind OpenAI's interface, with a page to chat on: `cs336 serve runs/mine`, then open the address.

    Under torchrun its processes divide the model: `torchrun --nproc_per_node 2 -m cs336 serve runs/mine`."""
    from cs336.inference import LLM, EngineConfig
    from cs336.inference.server.config import ServerConfig
    from cs336.parallel.launch import rank

    def run(
        model: Model,
        tokenizer: ModelTokenizer = None,
        draft: Draft = None,
        device: Device = "auto",
        dtype: WeightType = "auto",
        tool_parser: ToolParserName | None = None,
        reasoning_parser: ReasoningParserName | None = None,
        server: Annotated[ServerConfig, arg(name="")] = ServerConfig(),  # noqa: B008 (frozen)
        engine: Annotated[EngineConfig, arg(name="")] = EngineConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """
        Args:
            tool_parser: how the model writes calls of tools; as its chat template shows if none.
            reasoning_parser: how it writes what it thinks before it answers, none for text as any; as its chat template
                shows if left out.
        """
        try:
            from cs336.inference.server.serve import serve as listen
            from cs336.utils.http_server import check_free
        except ImportError as error:
            raise ImportError(f"serving needs what is not installed ({error}): pip install 'cs336[serve]'") from None
        if rank() == 0:
            check_free(server.host, server.port)
        read = {"draft": draft, "device": device, "dtype": weight_dtype(dtype), "tensor_parallel": True}
        read |= {"tool_parser": tool_parser, "reasoning_parser": reasoning_parser}
        listen(LLM(model, tokenizer, **read, **vars(engine)), server)

    return run


@Late
def chat(arguments: list[str]) -> Run:
    """Talk to a model in the terminal. /new forgets what was said, /quit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from cs336.inference import LLM, SamplingParams
    from cs336.inference.talk import Talk

    def run(
        model: Model,
        system: str | None = None,
        tokenizer: ModelTokenizer = None,
        draft: Draft = None,
        device: Device = "auto",
        dtype: WeightType = "auto",
        max_len: int | None = None,
        sampling: Annotated[SamplingParams, arg(name="")] = SamplingParams(temperature=0.7, max_tokens=512),  # noqa: B008
    ) -> None:
        """
        Args:
            system: what the model is told first.
            max_len: tokens of what is said altogether; the model's context_length, or what fits of it, if left out. A
                LongRoPE has its short factors where this is no more than its original context.
        """
        read = {"draft": draft, "device": device, "dtype": weight_dtype(dtype)}
        llm = LLM(model, tokenizer, max_seqs=1, max_len=max_len, **read)
        talk = Talk(llm, sampling, system)
        shown = visible if sys.stdout.isatty() else str
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                said = input(prompt).strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if said == "/quit":
                return
            if said == "/new":
                talk.forget()
                continue
            if not said:
                continue
            pieces = talk.say(said)
            try:
                print(shown(next(pieces, "")), end="", flush=True)
                with warnings_after():
                    for piece in pieces:
                        print(shown(piece), end="", flush=True)
                    print(f"\n[{talk.speed:.1f} tokens/s]")
            except KeyboardInterrupt:
                pieces.close()
                print()
            except ValueError as error:
                print(f"cs336: {error}", file=sys.stderr)

    return run


def bench(arguments: list[str]) -> Run:
    """Time a model's answers: `cs336 bench offline|latency|serve MODEL`; the last line is JSON."""
    import tyro

    from cs336.inference import bench as measured

    def run() -> int:
        app = tyro.extras.SubcommandApp()
        for name, call in (("offline", measured.offline), ("latency", measured.latency), ("serve", measured.serve)):
            app.command(name=name)(call)
        app.cli(prog="cs336 bench", args=arguments, config=OPTIONS)
        return os.EX_OK

    return run
