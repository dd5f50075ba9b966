"""Whether what a model wrote is right: a score and the reason for it."""

from cs336.verifiers.answers import Verdict as Verdict
from cs336.verifiers.answers import equal_answers as equal_answers
from cs336.verifiers.answers import extract_answer as extract_answer
from cs336.verifiers.answers import parse_number as parse_number
from cs336.verifiers.answers import verify_format as verify_format
from cs336.verifiers.answers import verify_math as verify_math
from cs336.verifiers.choices import extract_choice as extract_choice
from cs336.verifiers.choices import verify_choice as verify_choice
from cs336.verifiers.code import extract_code as extract_code
from cs336.verifiers.code import verify_code as verify_code
from cs336.verifiers.constraints import check as check
from cs336.verifiers.constraints import loosened as loosened
from cs336.verifiers.constraints import verify_constraints as verify_constraints
from cs336.verifiers.countdown import verify_countdown as verify_countdown
from cs336.verifiers.lean import verify_lean as verify_lean
from cs336.verifiers.refusals import is_refusal as is_refusal
from cs336.verifiers.sandbox import Limits as Limits
from cs336.verifiers.symbolic import verify_math_symbolic as verify_math_symbolic
