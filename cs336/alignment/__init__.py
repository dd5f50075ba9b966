"""From a base model to one that follows instructions and solves tasks: losses, verifiers, SFT and GRPO."""

from cs336.alignment.functions import entropy as entropy
from cs336.alignment.functions import kl as kl
from cs336.alignment.functions import masked_mean as masked_mean
from cs336.alignment.functions import masked_normalize as masked_normalize
from cs336.alignment.functions import response_mask as response_mask
from cs336.alignment.functions import sequence_log_probs as sequence_log_probs
from cs336.alignment.policy import gae as gae
from cs336.alignment.policy import group_advantages as group_advantages
from cs336.alignment.policy import policy_gradient_loss as policy_gradient_loss
from cs336.alignment.policy import policy_gradient_terms as policy_gradient_terms
from cs336.alignment.preferences import dpo_loss as dpo_loss
from cs336.alignment.preferences import reward_model_loss as reward_model_loss
from cs336.alignment.sft import SFT as SFT
from cs336.alignment.sft import Example as Example
from cs336.alignment.sft import encode_chat as encode_chat
from cs336.alignment.sft import pack_examples as pack_examples
from cs336.alignment.verifiers import Verdict as Verdict
from cs336.alignment.verifiers import equal_answers as equal_answers
from cs336.alignment.verifiers import extract_answer as extract_answer
from cs336.alignment.verifiers import parse_number as parse_number
from cs336.alignment.verifiers import verify_format as verify_format
from cs336.alignment.verifiers import verify_math as verify_math
