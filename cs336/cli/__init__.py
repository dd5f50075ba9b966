"""`cs336 VERB`: a thin file an area, and the program that runs one verb of them."""

from cs336.cli.program import DATA_VERBS as DATA_VERBS
from cs336.cli.program import TOKENIZER_VERBS as TOKENIZER_VERBS
from cs336.cli.program import VERBS as VERBS
from cs336.cli.program import main as main
