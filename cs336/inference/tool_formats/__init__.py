"""How families of models write calls of tools: a format a row, and how a chat template shows which is its model's."""

from cs336.inference.tool_formats.format import ToolFormat
from cs336.inference.tool_formats.harmony import HarmonyFormat
from cs336.inference.tool_formats.headed import HeadedFormat
from cs336.inference.tool_formats.json_object import ObjectFormat
from cs336.inference.tool_formats.pythonic import PythonicFormat
from cs336.inference.tool_formats.tagged import TaggedFormat

DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")


def _array(begin: str, closing: tuple[str, ...] = ("]",), **more) -> ObjectFormat:
    """A list of objects behind a mark."""
    written = (begin + "[", ", ", "".join(closing))
    return ObjectFormat(begin=begin, opening="[", separator=",", closing=closing, written=written, **more)


def _deepseek(before: str, between: str, behind: tuple[str, ...], separator: str) -> HeadedFormat:
    begin, opening, end, closing = DEEPSEEK
    return HeadedFormat(
        begin=begin,
        opening=opening,
        before=before,
        between=between,
        behind=(*behind, end),
        separator=opening,
        closing=(closing,),
        written=(begin + opening, separator + opening, closing),
    )


FORMATS: dict[str, ToolFormat] = {
    "hermes": ObjectFormat(
        begin="<tool_call>",
        closing=("</tool_call>",),
        written=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    ),
    "qwen3_coder": TaggedFormat(
        begin="<tool_call>",
        head="<function=",
        unmarked="<function=",
        behind_name=">\n",
        key="<parameter=",
        value=">",
        behind_value="</parameter>",
        end="</function>",
        line="\n",
        closing=("</tool_call>",),
        written=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    ),
    "glm45": TaggedFormat(
        begin="<tool_call>",
        behind_name="\n",
        key="<arg_key>",
        value="</arg_key>\n<arg_value>",
        behind_value="</arg_value>",
        end="</tool_call>",
        written=("<tool_call>", "\n<tool_call>", ""),
    ),
    "llama3_json": ObjectFormat(
        begin="<|python_tag|>", separator=";", bare="{", arguments="parameters", written=("", "; ", "")
    ),
    "pythonic": PythonicFormat(
        begin="<|python_tag|>", opening="[", separator=",", closing=("]",), bare="[", written=("[", ", ", "]")
    ),
    "olmo3": PythonicFormat(
        begin="<function_calls>",
        closing=("</function_calls>",),
        adjacent=True,
        written=("<function_calls>", "\n", "</function_calls>"),
    ),
    "mistral": _array("[TOOL_CALLS]", id_length=9),
    "mistral_args": HeadedFormat(
        begin="[TOOL_CALLS]",
        between="[ARGS]",
        call_id="[CALL_ID]",
        written=("[TOOL_CALLS]", "[TOOL_CALLS]", ""),
        id_length=9,
    ),
    "deepseek_v3": _deepseek("function<｜tool▁sep｜>", "\n```json\n", ("\n```",), "\n"),
    "deepseek_v31": _deepseek("", "<｜tool▁sep｜>", (), ""),
    "granite": _array("<|tool_call|>"),
    "cohere": _array(
        "<|START_ACTION|>", ("]", "<|END_ACTION|>"), name="tool_name", arguments="parameters", numbered=True
    ),
    "gpt_oss": HarmonyFormat(begin="<|channel|>", written=("", "", "")),
}
# The first whose marks are all in a template says its format.
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt_oss", ("<|channel|>", "functions.")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm45", ("<arg_key>",)),
    ("deepseek_v3", (DEEPSEEK[1], "```json")),
    ("deepseek_v31", (DEEPSEEK[1],)),
    ("mistral_args", ("[ARGS]",)),
    ("llama3_json", ('"parameters": dictionary',)),  # what Llama's asks for
    ("pythonic", ("[func_name1(",)),  # likewise
    ("olmo3", ("<function_calls>",)),
    ("cohere", ("<|START_ACTION|>",)),
    ("granite", ("<|tool_call|>",)),
    ("hermes", ("<tool_call>",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("mistral", ("[TOOL_CALLS]",)),
)


def format_of(template: str) -> ToolFormat | None:
    """The one that a chat template writes calls in, if it is one of FORMATS."""
    found = (name for name, marks in SIGNS if all(mark in template for mark in marks))
    name = next(found, None)
    if name is None or (name == "hermes" and "<function=" in template):  # another's, of which no row is
        return None
    return FORMATS[name]
