"""The device's side of a step: what the host says of it in one copy, the forward pass, and a token for each sequence.

A running sequence has a slot: a row of the page table, of how it is sampled, and of its newest token, which the next
step reads there, so that the host may lay that step out before it has seen the token. A step is one CUDA graph where it
fits a shape that was captured (shapes.py), filled up with a slot that stays empty: it decodes, and may read chunks of
prompts, or it verifies drafts of few sequences: each is a row of as many tokens, its own the last. Where prompts are
scored, or logits changed, the host launches a step kernel by kernel.

R = sequences of a step, those that decode first; T = its tokens; W = tokens of a row of a step that verifies;
B = those sequences of which a token is drawn; V = vocabulary; N = log-probabilities beside that of the token.
"""

import warnings
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cs336 import ops
from cs336.inference.branches import beside, branches
from cs336.inference.controls import Controls
from cs336.inference.halves import halves_of
from cs336.inference.sampling import MAX_LOGPROBS, SamplingParams
from cs336.inference.scheduler import Chunk, Sequence, Step
from cs336.inference.shapes import Shape, most_captured, prompt_shapes
from cs336.inference.slots import Slots
from cs336.inference.staging import Staging
from cs336.models import PagedState, Transformer
from cs336.nn import Chunks, PagedTokens
from cs336.nn.expert_list import ExpertList
from cs336.nn.moe import Experts
from cs336.ops import registry
from cs336.utils import nvtx

# Tokens of a step that Triton's kernels tell apart: their tiles grow in powers of two up to 32 rows, and a size of 1 or
# a multiple of 16 is compiled for.
WARM_UP = (1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256, 257, 1024)
WARM_UP_PARAMS = SamplingParams(temperature=0)
MOST_VERIFYING = 8  # sequences of a captured step that verifies: with more, drafts cost a good part of a step each
SCORED_ROWS = 256  # of logits at once, for the log-probabilities of a prompt: 256 x 151,936 float32 are 156 MB


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of tokens of prompts, and the likeliest in their places (rows, N)."""

    places: list[tuple[Sequence, int]]
    """Of each token: its sequence, and which of its tokens it is."""
    drawn: ops.Sampled


@dataclass(frozen=True)
class Launched:
    """A step on its way: once waited for, the tokens of each sequence, and what was asked of prompts."""

    sequences: list[Sequence]
    drafts: list[Rows[int]]
    """Of each, for which a token more is drawn each."""
    drawn: ops.Sampled
    scores: list[Scores]
    done: torch.cuda.Event | None

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


def _tokens_of(chunks: Rows[Chunk], first_row: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, positions and rows of all tokens of these chunks, and where each chunk ends, from 0 on."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    ends = [0]
    for row, chunk in enumerate(chunks, first_row):
        ids += chunk.token_ids
        positions += range(chunk.start, chunk.start + chunk.count)
        rows += [row] * chunk.count
        ends.append(len(ids))
    return ids, positions, rows, ends


def _capturable(model: Transformer) -> bool:
    """Whether a decoding step can be captured: one in which the host waits for the device, as plain torch does for what
    tensors hold, cannot be."""
    device = model.device
    if device.type != "cuda":
        return False
    slow = [op for op in ("paged_attention", "append_kv_", "sample") if registry.kernels(op, device)[0] == "ref"]
    if slow:
        reason = f"{', '.join(slow)} run plain torch ({registry.missing(slow[0], 'native', device)})"
    elif any(module.waits for module in model.modules() if isinstance(module, Experts | ExpertList)):
        reason = "the host waits for the loads of these experts, which it does not of stacks in bfloat16 on Hopper"
    else:
        return True
    warnings.warn(f"steps are not captured in CUDA graphs: {reason}", stacklevel=2)
    return False


class Runner:
    """Runs steps of a model on its paged state.

    unused: ids that are no token, and are never drawn.
    graphs: sizes of the batches whose decoding steps are captured, on a GPU.
    drafts: of a sequence, at most, of steps that verify them: such steps are captured too, where every state has pages.
    invariant: run inside cs336.invariant(), and take log-probabilities as training does.
    """

    def __init__(
        self,
        model: Transformer,
        state: PagedState,
        *,
        max_seqs: int,
        max_step_tokens: int,
        most_pages: int,
        unused: tuple[int, ...] = (),
        graphs: tuple[int, ...] = (),
        drafts: int = 0,
        invariant: bool = False,
    ):
        self.model, self.state, self.device = model, state, model.device
        self.slots = Slots(max_seqs, most_pages, self.device)
        self.controls = Controls(max_seqs + 1, model.config.vocab_size, unused, self.device)
        self._owners: list[Sequence | None] = [None] * max_seqs
        # At most: 3 numbers of a row, 6 of a token, 7 of a sequence that begins, 2 of one that was corrected, and
        # 3 of a new entry of the table; of a captured step that verifies 1 more of a row and 2 of each of its tokens.
        size = 18 * max_seqs + 6 * max_step_tokens + 3 * max_seqs * most_pages + 3 * max_seqs + 8
        size += MOST_VERIFYING * (1 + 2 * (1 + drafts))
        self._staging = Staging(size, self.device)
        self.max_step_tokens = max_step_tokens
        self.invariant = invariant
        self.fresh_apart = self.device.type == "cuda" and not invariant and state.is_paged
        """Sequences without tokens before attend without the pages, which Hopper's kernel of ops.attention_varlen does
        at its full rate."""
        self._arange = torch.arange(max_seqs, dtype=torch.int32, device=self.device)
        sizes = tuple(sorted(graphs)) if graphs and _capturable(model) else ()
        self._width = 1 + drafts
        self._sizes = {1: sizes}
        """Of the batches that are captured, by the tokens of a row: one, or the newest and its drafts."""
        self._halves = halves_of(model) if sizes and not invariant else None
        self._prompts: tuple[Shape, ...] = ()
        """Of the steps that are captured with prompts, the cheapest first."""
        if sizes and state.is_paged:  # a recurrence would see the tokens that fill up a row
            self._prompts = prompt_shapes(max_seqs, max_step_tokens, most_captured(model.config, max_step_tokens))
            if drafts:
                self._sizes[self._width] = tuple(size for size in sizes if size <= MOST_VERIFYING)
        self._graphs: dict[tuple[Shape, int], tuple[torch.cuda.CUDAGraph, ops.Sampled]] = {}

    @property
    def captures(self) -> bool:
        """Whether steps that only decode are CUDA graphs."""
        return bool(self._sizes[1])

    @torch.inference_mode()
    def capture(self) -> int:
        """Capture steps that read prompts, and the decoding step for each size of batch, the largest first: the others
        share its memory; then steps that verify drafts, and those by halves. Returns how many."""
        wanted = [*reversed(self._prompts)]
        wanted += [Shape(size, width) for width, sizes in self._sizes.items() for size in reversed(sizes)]
        if (halves := self._halves) is not None:
            wanted += [Shape(n, spare=halves.spare) for n in reversed(self._sizes[1]) if n >= halves.least_rows]
        for shape in wanted:
            self._captured(shape, 0)
        return len(wanted)

    def warm_up(self, page_size: int) -> int:
        """Run prompts of all kinds once, on pages of the pool: what is compiled or tuned at a first call of a shape is
        there when a request comes. Returns how many steps that took; on a CPU, where nothing is compiled, 0."""
        if self.device.type == "cpu":
            return 0
        most = min(self.max_step_tokens, self.slots.table.shape[1] * page_size - 1)
        sizes = [size for size in (most, *WARM_UP) if size <= most]
        cases = [(start, size) for size in sizes for start in (0, 1) if start + size <= most]
        for start, size in cases:
            ids = [0] * (start + size)
            pages = list(range(-(-len(ids) // page_size)))
            sequence = Sequence(ids, 1, WARM_UP_PARAMS, slot=0, pages=pages, computed=len(ids), sampled=1)
            self.launch(Step([], [Chunk(sequence, start, size, True)], [])).wait()
        self._owners[0] = None
        return len(cases)

    def drop_graphs(self) -> None:
        """The weights, or what is kept outside of pages, are other tensors now."""
        self._graphs.clear()

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start a step, and on a CPU end it. The step before the last must have been waited for."""
        sequences, n = step.sequences, len(step.decodes)
        sampled = [(s, ()) for s in step.decodes] + [(c.sequence, c.drafts) for c in step.chunks if c.samples]
        drawn_from = [s for s, drafts in sampled for _ in range(1 + len(drafts))]
        controlled = self.controls.wanted(drawn_from)
        num_logprobs = MAX_LOGPROBS if any(s.params.logprobs for s in drawn_from) else 0
        num_logprobs = min(num_logprobs, self.model.config.vocab_size)
        shape = None if controlled else self._shape(step)
        if shape is not None:
            graph, drawn = self._captured(shape, num_logprobs)
        self._staging.begin()
        rows, kept = self._put_captured(step, shape) if shape is not None else (self._put_rows(sequences), None)
        chunks = self._put_chunks(step) if step.chunks and shape is None else None
        self._put_news(sequences, step.copies)
        scores: list[Scores] = []
        with nvtx.annotate("prefill" if step.chunks else "decode"), registry.invariant(self.invariant):
            if shape is not None:
                graph.replay()
                if kept is not None:
                    drawn = ops.Sampled(*(x.index_select(0, kept) for x in drawn))
            elif chunks is None:
                options = self.controls.options(step.decodes, rows[0]) if controlled else self.controls.common(n)
                drawn = self._decode(rows, num_logprobs, options)
            else:
                drawn, scores = self._mixed(step, rows, chunks, drawn_from, num_logprobs, controlled)
        if controlled:
            slots = torch.tensor([s.slot for s in drawn_from], device=self.device)
            self.controls.drawn(slots, drawn.token_ids)
        drawn = ops.Sampled(*(x[: len(drawn_from)] for x in drawn))
        return self._bring_home([s for s, _ in sampled], [drafts for _, drafts in sampled], drawn, scores)

    # ---- what the host tells ----

    def _shape(self, step: Step) -> Shape | None:
        """Of the captured step that runs this one, if there is one."""
        n, chunks = len(step.decodes), step.chunks
        if not chunks or all(chunk.drafts for chunk in chunks):
            width, rows = self._width if chunks else 1, n + len(chunks)
            spare = self._halves.spare_of(step.decodes) if self._halves is not None and not chunks else 0
            sizes = self._sizes.get(width, ())
            return next((Shape(size, width, spare) for size in sizes if size >= rows), None)
        if any(chunk.drafts or chunk.sequence.score_from is not None for chunk in chunks):
            return None
        count = sum(chunk.count for chunk in chunks)
        fits = (s for s in self._prompts if n <= s.rows and len(chunks) <= s.chunks and count <= s.tokens)
        return next(fits, None)

    def _put_captured(self, step: Step, shape: Shape) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """What a captured step reads, first of all, and which of the tokens that it draws are wanted: None is the
        first."""
        if shape.chunks:
            empty = [None] * (shape.rows - len(step.decodes))
            rows = self._put_rows([*step.decodes, *empty, *(c.sequence for c in step.chunks)], shape.num_rows)
            return rows, self._put_prompts(step, shape)
        rows = self._put_rows(step.sequences, shape.rows)
        return rows, self._put_drafts(step, shape.rows) if shape.width > 1 else None

    def _put_rows(self, sequences: Rows[Sequence | None], size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, length with the tokens of this step, and how many tokens were drawn before: int32 (R,). None: empty."""
        put, empty = self._staging.put, self.slots.empty
        slots = put([empty if s is None else s.slot for s in sequences], size, empty)  # type: ignore[misc]
        lengths = put([0 if s is None else s.computed for s in sequences], size)
        return slots, lengths, put([0 if s is None else s.sampled - 1 for s in sequences], size)

    def _put_prompts(self, step: Step, shape: Shape) -> Tensor:
        """Behind the rows of a captured step: where each chunk ends, its last token, and ids, positions and rows of all
        tokens. Those that fill up are of one more row, which is empty. Returns which of what is drawn is wanted."""
        put, (N, C, T) = self._staging.put, (shape.rows, shape.chunks, shape.tokens)
        ids, positions, rows, ends = _tokens_of(step.chunks, N)
        put(ends, C + 1, len(ids))
        put([T])
        put([N + end - 1 for end in ends[1:]], C + 1, N)
        put(ids, T)
        put(positions, T, -1)
        put(rows, T, N + C)
        return put([*range(len(step.decodes)), *(N + i for i, chunk in enumerate(step.chunks) if chunk.samples)])

    def _put_chunks(self, step: Step) -> dict[str, Tensor]:
        put, n = self._staging.put, len(step.decodes)
        ids, positions, rows, ends = _tokens_of(step.chunks, n)
        old = self._continued(step)
        sampling = [(row, chunk) for row, chunk in enumerate(step.chunks, n) if chunk.samples]
        samples = [(row, back) for row, chunk in sampling for back in range(len(chunk.drafts), -1, -1)]
        offsets = [s.sampled - 1 for s in step.sequences]
        return {
            "ids": put(ids),
            "positions": put(positions),
            "rows": put(rows),
            "continued": put(ends[: old + 1]),
            "fresh": put([end - ends[old] for end in ends[old:]]),
            "drawn_tokens": put([*range(n), *(n + ends[row - n + 1] - 1 - back for row, back in samples)]),
            "drawn_rows": put([*range(n), *(row for row, _ in samples)]),
            "drawn_offsets": put([*offsets[:n], *(offsets[row] - back for row, back in samples)]),
        }

    def _put_drafts(self, step: Step, size: int) -> Tensor:
        """Behind the rows of a captured step: how many tokens each has, and its drafts (R, W) at the end of its row.
        Returns which of the tokens drawn, R W, are wanted."""
        W, n = self._width, len(step.decodes)
        counts = [1] * n + [chunk.count for chunk in step.chunks]
        ids_RW = np.zeros((size, W), dtype=np.int32)
        for row, chunk in enumerate(step.chunks, n):
            ids_RW[row, W - len(chunk.drafts) :] = chunk.drafts
        self._staging.put(counts, size)
        self._staging.put(ids_RW.reshape(-1))
        return self._staging.put([row * W + j for row, count in enumerate(counts) for j in range(W - count, W)])

    def _put_news(self, sequences: Rows[Sequence], copies: list[tuple[int, int]]) -> None:
        """Send all, and place what is new of these sequences: pages, and how those are sampled that have new slots."""
        grown = [s for s in sequences if s.told < len(s.pages)]
        entries = [(s.slot, j, s.pages[j]) for s in grown for j in range(s.told, len(s.pages))]
        fresh = [s for s in grown if self._owners[s.slot] is not s]  # type: ignore[index]
        corrected = [s for s in sequences if s.corrected]
        put = self._staging.put
        corrections = [put([s.slot for s in corrected]), put([s.token_ids[-1] for s in corrected])]  # type: ignore[misc]
        cells = [put(column) for column in zip(*entries, strict=True)]
        pages = [put(column) for column in zip(*copies, strict=True)]
        if fresh:
            slots, params = put([s.slot for s in fresh]), [s.params for s in fresh]  # type: ignore[misc]
            top_k = put([min(p.top_k or 0, self.model.config.vocab_size) for p in params])
            floats = [self._staging.put_floats(p.temperature for p in params)]
            floats.append(self._staging.put_floats(1.0 if p.top_p is None else p.top_p for p in params))
            floats.append(self._staging.put_floats(p.min_p or 0.0 for p in params))
            halves = put(np.array([s.seed for s in fresh], dtype=np.int64).view(np.int32))
        self._staging.send()
        if entries:
            slot_K, column_K, page_K = cells
            self.slots.table.index_put_((slot_K.long(), column_K.long()), page_K)
        for s in grown:
            s.told = len(s.pages)
        if fresh:
            where = slots.long()
            self.slots.top_k.index_copy_(0, where, top_k)
            self.slots.floats.index_copy_(1, where, torch.stack(floats).view(torch.float32))
            low, high = halves.long().view(-1, 2).unbind(1)
            self.slots.seeds.index_copy_(0, where, high << 32 | low & 0xFFFFFFFF)
        if corrected:
            slot_C, token_C = (x.long() for x in corrections)
            self.slots.newest.index_copy_(0, slot_C, token_C)
        for s in corrected:
            s.corrected = False
        for s in fresh:
            self._owners[s.slot] = s  # type: ignore[index]
            self.controls.begin(s)
        if pages:
            self.state.copy_pages(*pages)

    # ---- the forward pass ----

    def _decode(self, rows: Rows[Tensor], num_logprobs: int, options, spare: int = 0) -> ops.Sampled:
        """One token more of each row; with `spare` multiprocessors by halves."""
        slot_R, length_R, offset_R = rows
        if spare:
            features_RM = self._by_halves(slot_R, length_R, spare)
        else:
            ids_1R, self.state.tokens = self._newest(slot_R, length_R)
            features_RM = self.model.features(ids_1R, state=self.state)[0]
        return self._draw(features_RM, slot_R, offset_R, num_logprobs, options)

    def _newest(self, slot_R: Tensor, length_R: Tensor, spare: int = 0) -> tuple[Tensor, PagedTokens]:
        """The newest token of each row, (1, R), and where its state is."""
        R = len(slot_R)
        table = self.slots.table.index_select(0, slot_R)
        # These were written before the ids were looked up, which no kernel overlaps.
        tokens = PagedTokens(table, length_R, self._arange[:R], length_R - 1, R, slot_R, settled=True, spare=spare)
        return self.slots.newest.index_select(0, slot_R)[None], tokens

    def _by_halves(self, slot_R: Tensor, length_R: Tensor, spare: int) -> Tensor:
        """What the head reads of these rows, (R, M). While one half attends, which takes memory's time, the `spare`
        multiprocessors that it leaves alone compute the other's products."""
        half, batches = len(slot_R) // 2, []
        for some in (slice(half), slice(half, None)):
            state = PagedState(self.state.layers)
            ids_1H, state.tokens = self._newest(slot_R[some], length_R[some], spare)
            batches.append((ids_1H, state))
        with branches(self.device) as places:
            features = self.model.features_beside(batches, places)
        return torch.cat([features_1HM[0] for features_1HM in features])

    def _read(self, given: Tensor, shape: Shape, num_logprobs: int, options) -> ops.Sampled:
        """One token more of the first rows, and chunks of prompts: what is drawn behind each, whole or not."""
        N, R, C, T = shape.rows, shape.num_rows, shape.chunks, shape.tokens
        slot_R, length_R, offset_R, ends, last, ids_T, position_T, row_T = given.split([R, R, R, C + 2, C + 1, T, T, T])
        table = self.slots.table.index_select(0, slot_R)
        newest_N = self.slots.newest.index_select(0, slot_R[:N])
        self.state.tokens = PagedTokens(
            table,
            length_R,
            torch.cat((self._arange[:N], row_T)),
            torch.cat((length_R[:N] - 1, position_T)),
            N,
            slot_R,
            Chunks(slice(N, R), slice(N, N + T), ends, T),
            settled=True,
        )
        features_TM = self.model.features(torch.cat((newest_N, ids_T.long()))[None], state=self.state)[0]
        features_RM = torch.cat((features_TM[:N], features_TM.index_select(0, last)))
        return self._draw(features_RM, slot_R, offset_R, num_logprobs, options)

    def _verify(self, rows: Rows[Tensor], ids_RW: Tensor, num_logprobs: int, options) -> ops.Sampled:
        """The newest token of each row and its drafts, the last of the row's W tokens: what is drawn behind each. Those
        before them are nothing, are kept nowhere, and what is drawn behind them is not looked at."""
        slot_R, length_R, offset_R, count_R = rows
        R, W = ids_RW.shape
        back_W = torch.arange(W - 1, -1, -1, dtype=torch.int32, device=self.device)
        newest_R = self.slots.newest.index_select(0, slot_R)
        ids_RW = torch.where(back_W == count_R[:, None] - 1, newest_R[:, None], ids_RW)
        position_RW = torch.where(back_W < count_R[:, None], length_R[:, None] - 1 - back_W, -1)
        ends = torch.arange(0, R * W + 1, W, dtype=torch.int32, device=self.device)
        self.state.tokens = PagedTokens(
            self.slots.table.index_select(0, slot_R),
            length_R,
            self._arange[:R].repeat_interleave(W),
            position_RW.flatten(),
            0,
            slot_R,
            Chunks(slice(0, R), slice(0, R * W), ends, W),
        )
        features_TM = self.model.features(ids_RW.view(1, -1), state=self.state)[0]
        offset_RW = (offset_R[:, None] - back_W).clamp(min=0)
        drawn = self._draw(features_TM, slot_R.repeat_interleave(W), offset_RW.flatten(), num_logprobs, options)
        self.slots.newest.index_copy_(0, slot_R.long(), drawn.token_ids.view(R, W)[:, -1])
        return drawn

    def _draw(self, features_BM: Tensor, slot_B: Tensor, offset_B: Tensor, num_logprobs: int, options) -> ops.Sampled:
        with beside(self.device) as join:
            place_B, settings = slot_B.long(), self.slots.settings(slot_B, offset_B)
        logits_BV = self.model.logits(features_BM)
        join()
        drawn = ops.sample(logits_BV, *settings, num_logprobs=num_logprobs, **options)
        self.slots.newest.index_copy_(0, place_B, drawn.token_ids)
        if self.invariant:
            drawn = drawn._replace(logprobs=self._log_probs(features_BM, logits_BV, drawn.token_ids))
        return drawn

    def _log_probs(self, features_BM: Tensor, logits_BV: Tensor, ids_B: Tensor) -> Tensor:
        """As training takes them: (B,) float32. From the logits where these lie in memory as training's do, whose rows
        begin at multiples of 16 bytes, and are not capped yet: a product with the head less."""
        softcap = self.model.config.logit_softcap
        if softcap is None and logits_BV.shape[1] * logits_BV.itemsize % 16 == 0:
            return -ops.cross_entropy(logits_BV, ids_B, reduction="none")
        head = self.model.embedding if self.model.head is None else self.model.head
        return ops.linear_log_probs(features_BM, head.weight, ids_B, softcap=softcap)

    def _mixed(
        self,
        step: Step,
        rows,
        chunks: dict[str, Tensor],
        drawn_from: list[Sequence],
        num_logprobs: int,
        controlled: bool,
    ) -> tuple[ops.Sampled, list[Scores]]:
        """One token more of the first rows, and chunks of the others."""
        slot_R, length_R, _ = rows
        n = len(step.decodes)
        ids_T = torch.cat((self.slots.newest.index_select(0, slot_R[:n]), chunks["ids"].long()))
        self.state.tokens = PagedTokens(
            self.slots.table.index_select(0, slot_R),
            length_R,
            torch.cat((self._arange[:n], chunks["rows"])),
            torch.cat((length_R[:n] - 1, chunks["positions"])),
            n,
            slot_R,
            *self._groups(step, chunks),
        )
        features_TM = self.model.features(ids_T[None], state=self.state)[0]
        scores = self._score(step.chunks, features_TM[n:])
        slot_B, offset_B = slot_R.index_select(0, chunks["drawn_rows"]), chunks["drawn_offsets"]
        features_BM = features_TM.index_select(0, chunks["drawn_tokens"])
        options = self.controls.options(drawn_from, slot_B) if controlled else self.controls.common(len(drawn_from))
        return self._draw(features_BM, slot_B, offset_B, num_logprobs, options), scores

    def _continued(self, step: Step) -> int:
        """How many of the chunks look into the pages: on a CPU all, on a GPU those of sequences with tokens before."""
        return len(step.chunks) - self.fresh_apart * sum(chunk.start == 0 for chunk in step.chunks)

    def _groups(self, step: Step, put: dict[str, Tensor]) -> list[Chunks | None]:
        """The chunks that look into the pages, and those that need not."""
        groups: list[Chunks | None] = []
        row, token, old = len(step.decodes), len(step.decodes), self._continued(step)
        for name, chunks in (("continued", step.chunks[:old]), ("fresh", step.chunks[old:])):
            counts = [chunk.count for chunk in chunks]
            rows, tokens = slice(row, row + len(counts)), slice(token, token + sum(counts))
            groups.append(Chunks(rows, tokens, put[name], max(counts)) if counts else None)
            row, token = rows.stop, tokens.stop
        return groups

    def _score(self, chunks: Rows[Chunk], features_TM: Tensor) -> list[Scores]:
        """Of the tokens that follow those of chunks, as far as they are of the prompt and asked for."""
        places: list[tuple[Sequence, int]] = []
        rows: list[int] = []
        begin = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.score_from is not None:
                first = max(chunk.start + 1, sequence.score_from)
                ends = range(first, min(chunk.start + chunk.count + 1, sequence.num_prompt))
                places += [(sequence, i) for i in ends]
                rows += [begin + i - 1 - chunk.start for i in ends]  # of the tokens before them
            begin += chunk.count
        if not rows:
            return []
        numbers_2S = torch.tensor([rows, [sequence.token_ids[i] for sequence, i in places]], dtype=torch.int64)
        if self.device.type == "cuda":  # from pages that stay where they are, so that the host need not wait
            numbers_2S = numbers_2S.pin_memory().to(self.device, non_blocking=True)
        scores = []
        for at in range(0, len(rows), SCORED_ROWS):
            some = places[at : at + SCORED_ROWS]
            row_S, ids_S = numbers_2S[:, at : at + SCORED_ROWS]
            features_SM = features_TM.index_select(0, row_S)
            logits_SV = self.model.logits(features_SM)
            logprobs_SV = logits_SV.log_softmax(-1, dtype=torch.float32)
            N = max(sequence.params.prompt_logprobs or 0 for sequence, _ in some)
            top = logprobs_SV.topk(min(N, logprobs_SV.shape[1]))
            found_S = logprobs_SV.gather(1, ids_S[:, None])[:, 0]
            if self.invariant:
                found_S = self._log_probs(features_SM, logits_SV, ids_S)
            scores.append(Scores(some, ops.Sampled(ids_S, found_S, top.indices, top.values)))
        return scores

    def _captured(self, shape: Shape, num_logprobs: int) -> tuple[torch.cuda.CUDAGraph, ops.Sampled]:
        """The graph of a step of that shape."""
        if found := self._graphs.get((shape, num_logprobs)):
            return found
        run = self._laid_out(shape, num_logprobs)
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with registry.invariant(self.invariant):
            with torch.cuda.stream(stream):  # kernels are compiled and libraries set up outside of the capture
                for _ in range(1 if self.state.is_paged else 2):  # the first step of a state in slots is like no other
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                drawn = run()
        self._graphs[shape, num_logprobs] = graph, drawn
        return graph, drawn

    def _laid_out(self, shape: Shape, num_logprobs: int) -> Callable[[], ops.Sampled]:
        """A step of that shape, which reads its numbers where steps put them first; all are empty now."""
        given, R, W = self._staging.first(shape.numbers), shape.num_rows, shape.width
        given.zero_()
        given[:R] = self.slots.empty
        options = self.controls.common(R * W)
        if shape.chunks:
            given[3 * R + shape.chunks + 1] = shape.tokens  # all of the row that is empty
            given[-2 * shape.tokens : -shape.tokens] = -1
            return partial(self._read, given, shape, num_logprobs, options)
        if W == 1:
            return partial(self._decode, given.view(3, R).unbind(), num_logprobs, options, shape.spare)
        rows, ids_RW = given[: 4 * R].view(4, R).unbind(), given[4 * R :].view(R, W)
        return partial(self._verify, rows, ids_RW, num_logprobs, options)

    # ---- what comes back ----

    def _bring_home(
        self, sequences: list[Sequence], drafts: list[Rows[int]], drawn: ops.Sampled, scores: list[Scores]
    ) -> Launched:
        if self.device.type == "cpu":
            return Launched(sequences, drafts, drawn, scores, None)

        def copy(found: ops.Sampled) -> ops.Sampled:
            hosts = (torch.empty(x.shape, dtype=x.dtype, pin_memory=x.numel() > 0) for x in found)
            pairs = zip(hosts, found, strict=True)
            return ops.Sampled(*(host.copy_(x, non_blocking=True) if x.numel() else host for host, x in pairs))

        home, scored = copy(drawn), [Scores(s.places, copy(s.drawn)) for s in scores]
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return Launched(sequences, drafts, home, scored, done)
