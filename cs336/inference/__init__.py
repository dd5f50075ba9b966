"""Text out of a trained model: sampling rules, generation row by row, and an engine for many requests at once."""

from cs336.inference.beams import BeamParams as BeamParams
from cs336.inference.beams import beam_search as beam_search
from cs336.inference.embed import embed as embed
from cs336.inference.engine import Engine as Engine
from cs336.inference.engine import EngineConfig as EngineConfig
from cs336.inference.generate import Completion as Completion
from cs336.inference.generate import generate as generate
from cs336.inference.generate import generate_ids as generate_ids
from cs336.inference.generate import stream as stream
from cs336.inference.llm import LLM as LLM
from cs336.inference.outputs import CompletionOutput as CompletionOutput
from cs336.inference.outputs import RequestOutput as RequestOutput
from cs336.inference.outputs import Token as Token
from cs336.inference.sampling import SamplingParams as SamplingParams
from cs336.inference.sampling import sample as sample
