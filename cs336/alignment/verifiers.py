"""The verifiers that rewards come from: `cs336.verifiers`, under the name of who asks for them."""

from cs336.verifiers import Limits as Limits
from cs336.verifiers import Verdict as Verdict
from cs336.verifiers import equal_answers as equal_answers
from cs336.verifiers import extract_answer as extract_answer
from cs336.verifiers import extract_code as extract_code
from cs336.verifiers import is_refusal as is_refusal
from cs336.verifiers import parse_number as parse_number
from cs336.verifiers import sandbox as sandbox
from cs336.verifiers import verify_code as verify_code
from cs336.verifiers import verify_constraints as verify_constraints
from cs336.verifiers import verify_countdown as verify_countdown
from cs336.verifiers import verify_format as verify_format
from cs336.verifiers import verify_lean as verify_lean
from cs336.verifiers import verify_math as verify_math
from cs336.verifiers import verify_math_symbolic as verify_math_symbolic
from cs336.verifiers.judge import Judge as Judge
