"""Text out of a trained model: sampling rules, and generation, row by row."""

from cs336.inference.generate import Completion as Completion
from cs336.inference.generate import generate as generate
from cs336.inference.generate import generate_ids as generate_ids
from cs336.inference.generate import stream as stream
from cs336.inference.sampling import SamplingParams as SamplingParams
from cs336.inference.sampling import sample as sample
