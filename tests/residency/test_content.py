"""Whole steps of tiered KV under random schedules: every token that a layer reads is the one that
was written there, whatever moved meanwhile.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, Loading, pages_for
from specontext_vllm.residency import tiers as tiers_module
from specontext_vllm.residency.memory_model import TierPlan
from specontext_vllm.retrieval.selection import add_drafts
from specontext_vllm.step_data import (
    PageTable,
    RowQueries,
    ScheduledStep,
    Selection,
    StartedRequest,
    StepBatch,
)
from tests.poison import PoisonedTieredKV

ORDER = (0, 1, 2, 2, 0, 3, 1, 3, 2)
"""Layers as the model reads them: all but the first time it is another layer's KV."""
LAYERS, MIRRORED, HEADS, DIM, PAGES, LANES, BUDGET, HOT, LONGEST = 4, 3, 2, 2, 17, 3, 3, 5, 8
DRAFTS = 3
TABLE = BUDGET + pages_for(DRAFTS)
STAGING = LONGEST
FRAMES = (LAYERS - MIRRORED) * PAGES + MIRRORED * min(PAGES, LANES * HOT) + 2 * STAGING
STEP_TOKENS = 40
PAGE_BYTES = HEADS * PAGE_SIZE * 2 * DIM * 4


@dataclass
class Request:
    """``tokens``: what makes each token's KV, prompt first; ``computed`` of them have been written;
    ``answer`` more are wanted. During a step the last ``drafts`` are drafts.
    """

    name: str
    tokens: list[int]
    answer: int
    computed: int = 0
    drafts: int = 0
    pages: list[int] = field(default_factory=list)


class Schedule:
    """vLLM's scheduler in small: chunks of any size, one token included, prefix hits on computed
    pages, preemptions, pages taken from the least recently freed, drafts of which some are kept.
    """

    def __init__(
        self, seed: int, slowly: bool, device: torch.device, loading: Loading = "adaptive"
    ) -> None:
        self.random = Random(seed)
        plan = TierPlan(PAGES, MIRRORED, HOT, FRAMES, STAGING, 0, 0, {}, LANES)
        self.device = device
        with pytest.MonkeyPatch.context() as patch:
            if slowly:
                patch.setattr(tiers_module, "RETURN_BYTES", (1 + seed % 2) * PAGE_BYTES)
            self.tiers = PoisonedTieredKV(
                plan,
                num_layers=LAYERS,
                num_kv_heads=HEADS,
                head_dim=DIM,
                dtype=torch.float32,
                max_requests=LANES,
                max_rows=LANES,
                table_pages=TABLE,
                max_pages=LONGEST,
                keep_unreferenced=True,
                timed=False,
                order=ORDER,
                loading=loading,
                device=device,
            )
        self.tiers.pools.arena.fill_(float("nan"))
        self.tiers.pools.host.fill_(float("nan"))
        self.tiers.hot_size.choose = lambda ledger: self.random.choice((TABLE, HOT))
        table = PageTable.allocate(LANES, HEADS, TABLE, device)
        self.selection = Selection.into(table, count_from_start=LONGEST)
        self.tiers.bind(self.selection)
        self.free = list(range(PAGES))
        self.held: dict[int, list[int]] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.ended: list[Request] = []
        self.made = self.token = self.groups = 0
        self.seen = Counter(
            {
                "offloaded": 0,
                "hits": 0,
                "preempted": 0,
                "chunks of one": 0,
                "staged": 0,
                "staged again": 0,
                "decoded": 0,
                "came back": 0,
                "came back slowly": 0,
                "kept drafts": 0,
                "rejected drafts": 0,
                "pages begun by drafts": 0,
            }
        )

    # -- the scheduler

    def new_tokens(self, count: int) -> list[int]:
        self.token += count
        return list(range(self.token - count, self.token))

    def arrive(self) -> None:
        """A request whose prompt may begin like that of another one, running or ended."""
        count = self.random.randint(1, (LONGEST - 2) * PAGE_SIZE)
        others = [r for r in self.running if r.computed >= PAGE_SIZE] + self.ended[-3:]
        begin: list[int] = []
        if others and self.random.random() < 0.5:
            other = self.random.choice(others)
            begin = other.tokens[
                : self.random.randint(1, max(1, (other.computed or len(other.tokens)) // PAGE_SIZE))
                * PAGE_SIZE
            ][: count - 1]
        self.waiting.append(
            Request(
                f"r{self.made}",
                begin + self.new_tokens(count - len(begin)),
                self.random.choice((1, 9, 30)),
            )
        )
        self.made += 1

    def hit(self, request: Request) -> list[int]:
        """Pages that hold the request's first tokens; never all of them."""
        found = []
        for first in range(0, len(request.tokens) - 1, PAGE_SIZE):
            wanted = request.tokens[first : first + PAGE_SIZE]
            page = next((page for page, tokens in self.held.items() if tokens == wanted), None)
            if page is None or first + PAGE_SIZE >= len(request.tokens):
                break
            found.append(page)
        return found

    def take(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        for page in taken:
            self.held.pop(page, None)
        return taken

    def let_go(self, request: Request) -> None:
        others = {page for other in self.running if other is not request for page in other.pages}
        self.free += [page for page in request.pages if page not in others]
        request.pages, request.computed = [], 0

    def step(self) -> None:
        """Schedule one step and run it."""
        released, started, grown = [], [], []
        room, chunks, preempted = STEP_TOKENS, {}, self.seen["preempted"]
        for request in [r for r in self.running if len(r.tokens) == r.computed and not r.answer]:
            self.running.remove(request)
            self.let_go(request)
            self.ended.append(request)
            released.append(request.name)
        for request in list(self.running):
            if request not in self.running or not room:
                continue
            if request.computed == len(request.tokens):
                request.tokens += self.new_tokens(1)
                request.answer -= 1
            left = len(request.tokens) - request.computed
            chunk = min(room, self.random.choice((1, 2, 7, 16, left, left)), left)
            if left == 1 and request.answer:
                wanted = self.random.choice((0, 1, 2, 3))
                request.drafts = min(wanted, request.answer, room - 1)
                request.tokens += self.new_tokens(request.drafts)
                chunk += request.drafts
            need = max(0, pages_for(request.computed + chunk) - len(request.pages))
            while (taken := self.take(need)) is None:
                victim = next(
                    (
                        r
                        for r in reversed(self.running)
                        if r is not request and r.name not in chunks
                    ),
                    None,
                )
                if victim is None:
                    break
                self.running.remove(victim)
                self.let_go(victim)
                released.append(victim.name)
                self.waiting.insert(0, victim)
                self.seen["preempted"] += 1
            if taken is None:
                self.reject(request, request.drafts)
                continue
            request.pages += taken
            if taken:
                grown.append((request.name, taken))
            chunks[request.name] = (request, chunk)
            room -= chunk
        while (
            self.waiting
            and room
            and len(self.running) < LANES
            and self.seen["preempted"] == preempted
        ):
            request = self.waiting[0]
            hit = self.hit(request)
            chunk = min(
                room,
                len(request.tokens) - len(hit) * PAGE_SIZE,
                self.random.choice((1, 3, 16, 999)),
            )
            self.free = [page for page in self.free if page not in hit]
            taken = self.take(pages_for(len(hit) * PAGE_SIZE + chunk) - len(hit))
            if taken is None:
                others = {page for other in self.running for page in other.pages}
                self.free += [page for page in hit if page not in others]
                break
            self.waiting.pop(0)
            request.pages, request.computed = hit + taken, len(hit) * PAGE_SIZE
            self.running.append(request)
            started.append(StartedRequest(request.name, list(request.pages), len(hit)))
            self.seen["hits"] += len(hit)
            chunks[request.name] = (request, chunk)
            room -= chunk
        self.run(released, started, grown, [chunks[name] for name in chunks])

    @staticmethod
    def reject(request: Request, count: int) -> None:
        """Take back the last ``count`` of its tokens, which are drafts; the others are answer."""
        if count:
            del request.tokens[-count:]
        request.answer -= request.drafts - count
        request.drafts = 0

    # -- the model

    @staticmethod
    def kv(tokens: list[int], layer: int) -> torch.Tensor:
        """``[N, H, D]``: of a token, a layer and a head."""
        base = torch.tensor(tokens, dtype=torch.float32)[:, None, None] + 0.25 * layer
        return (base + 0.0625 * torch.arange(HEADS)[None, :, None]).expand(-1, -1, DIM).contiguous()

    def check_kv(
        self, found: torch.Tensor, request: Request, first: int, last: int, layer: int, head: int
    ) -> None:
        """``found [N, 2 * D]`` is the KV of the request's tokens from ``first`` to ``last``."""
        wanted = self.kv(request.tokens[first:last], layer)[:, head, :1].expand(-1, 2 * DIM)
        assert torch.equal(found, wanted), (
            request.name,
            first,
            last,
            layer,
            head,
            found[:, 0].tolist(),
            wanted[:, 0].tolist(),
        )

    def run(self, released, started, grown, chunks) -> None:
        tiers = self.tiers
        chunks.sort(key=lambda entry: entry[1] != 1 + entry[0].drafts)
        decodes = [request for request, chunk in chunks if chunk == 1 + request.drafts]
        self.seen["chunks of one"] += sum(
            request.computed + 1 + request.drafts < len(request.tokens) for request in decodes
        )
        self.seen["decoded"] += len(decodes)
        before, slowly = tiers.status().resident_layers, tiers.is_returning
        new = {request.name for request in started}
        written = [(r.name, r.computed // PAGE_SIZE) for r, _ in chunks if r.name not in new]
        tiers.follow(
            ScheduledStep(
                released=released,
                started=started,
                grown=grown,
                decoding=[r.name for r in decodes],
                prefilling=[r.name for r, chunk in chunks if chunk > 1 + r.drafts],
                written=written,
            )
        )
        resident = tiers.status().resident_layers
        self.seen["came back"] += resident > before
        self.seen["came back slowly"] += resident > before and slowly
        self.seen["offloaded"] += resident < LAYERS
        if not chunks:
            return
        rows = len(chunks)
        table = torch.zeros(rows, LONGEST, dtype=torch.int32)
        for row, (request, _) in enumerate(chunks):
            table[row, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
        ends = [request.computed + chunk for request, chunk in chunks]
        positions = [
            position
            for (request, chunk), end in zip(chunks, ends)
            for position in range(request.computed, end)
        ]
        owners = [request for request, chunk in chunks for _ in range(chunk)]
        slots = torch.tensor(
            [r.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for r, p in zip(owners, positions)]
        )
        written_tokens = [r.tokens[p] for r, p in zip(owners, positions)]
        tiers.place_rows([r.name for r in decodes], len(decodes))
        selected = self.select(decodes)
        table, slots = table.to(self.device), slots.to(self.device)
        positions = torch.tensor(positions, device=self.device)
        query_lens = [chunk for _, chunk in chunks]
        starts = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=self.device)
        batch = StepBatch(
            token_ids=torch.zeros_like(positions),
            positions=positions,
            slots=slots,
            query_starts=starts,
            seq_lens=torch.tensor(ends, dtype=torch.int32, device=self.device),
            block_table=table,
            seq_lens_bound=ends,
            num_decodes=len(decodes),
            table_rows=len(decodes),
            num_tokens=len(positions),
            query_lens=query_lens,
            max_queries=max((1 + request.drafts for request in decodes), default=1),
        )
        queries = None
        if batch.max_queries > 1:
            add_drafts(self.selection, batch)
            queries = RowQueries(starts[: len(decodes) + 1], batch.max_queries)
        if decodes:
            tiers.resolve(self.selection, batch.without_drafts())
        tiers.fetch(len(decodes))
        tiers.stage(batch)
        tokens = sum(query_lens[: len(decodes)])
        prefills = chunks[len(decodes) :]
        for place, layer in enumerate(ORDER):
            new = None
            if layer not in ORDER[:place]:
                new = self.kv(written_tokens, layer).to(self.device)
                tiers.write(layer, new, new, slots, tokens, queries)
                new = new[tokens:]
            # Those that read another one's KV have its page table; the last one tells for all.
            if new is not None or place == len(ORDER) - 1:
                self.read_decodes(layer, decodes, selected)
            self.read_prefills(place, prefills, table[len(decodes) :], new)
        for request, chunk in chunks:
            rejected = self.random.randint(0, request.drafts)
            self.seen["kept drafts"] += request.drafts - rejected
            self.seen["rejected drafts"] += rejected
            self.reject(request, rejected)
            request.computed += chunk - rejected
            for index in range(request.computed // PAGE_SIZE):
                self.held[request.pages[index]] = request.tokens[
                    index * PAGE_SIZE : (index + 1) * PAGE_SIZE
                ]

    def select(self, decodes: list[Request]) -> list[list[int]]:
        """The first, the last and some pages in between, for each row and head, and then those that
        its drafts begin; fills the page table, without these.
        """
        chosen = []
        for sequence in range(len(decodes) * HEADS):
            length = decodes[sequence // HEADS].computed + 1
            count = pages_for(length)
            middle = self.random.sample(range(1, count - 1), min(BUDGET - 2, max(0, count - 2)))
            pages = sorted({0, count - 1, *middle})
            self.selection.pages[sequence, : len(pages)] = (
                torch.tensor(pages, dtype=torch.int32, device=self.device) * HEADS
                + sequence % HEADS
            )
            self.selection.lengths[sequence] = (
                (len(pages) - 1) * PAGE_SIZE + (length - 1) % PAGE_SIZE + 1
            )
            begun = range(count, pages_for(length + decodes[sequence // HEADS].drafts))
            self.seen["pages begun by drafts"] += len(begun)
            chosen.append([*pages, *begun])
        return chosen

    def read_decodes(self, layer: int, decodes: list[Request], selected: list[list[int]]) -> None:
        head_pages, tables = (
            self.tiers.arena.view(-1, PAGE_SIZE, 2 * DIM).cpu(),
            self.tiers.page_table(layer).pages.cpu(),
        )
        for sequence, pages in enumerate(selected):
            request, head = decodes[sequence // HEADS], sequence % HEADS
            for column, page in enumerate(pages):
                first = page * PAGE_SIZE
                last = min(first + PAGE_SIZE, request.computed + 1 + request.drafts)
                found = head_pages[tables[sequence, column].long(), : last - first]
                self.check_kv(found, request, first, last, layer, head)

    def read_prefills(
        self, place: int, prefills, table: torch.Tensor, new: torch.Tensor | None
    ) -> None:
        tiers, layer = self.tiers, ORDER[place]
        if not prefills:
            return
        if not tiers.is_staged(layer):
            self.read_rows(layer, prefills, tiers.prompt_block_table(layer, table))
            return
        groups = 0
        for stage in tiers.staged_rows(place):
            if new is not None:
                kv = torch.cat([new[stage.tokens]] * 2, -1)
                tiers.arena[stage.slots // PAGE_SIZE, :, stage.slots % PAGE_SIZE] = kv
            self.read_rows(layer, prefills[stage.rows], stage.block_table)
            groups += 1
        self.seen["staged"] += 1
        self.seen["staged again"] += new is None
        self.groups = max(self.groups, groups)

    def read_rows(self, layer: int, rows, table: torch.Tensor) -> None:
        table, arena = table.cpu(), self.tiers.arena.cpu()
        for row, (request, chunk) in enumerate(rows):
            end = request.computed + chunk
            for head in range(HEADS):
                frames = table[row, : pages_for(end)].long()
                found = arena[frames, head].reshape(-1, 2 * DIM)[:end]
                self.check_kv(found, request, 0, end, layer, head)


@pytest.fixture(autouse=True)
def restless(monkeypatch):
    """Layers come and go more often than in service."""
    monkeypatch.setattr("specontext_vllm.residency.ledger.COOLDOWN_STEPS", 4)


def test_no_step_begins_after_one_whose_copies_did_not_come(device):
    schedule = Schedule(0, False, device)
    schedule.step()
    schedule.tiers.copies.progress.overdue.fill_(LAYERS)
    with pytest.raises(RuntimeError, match=f"layer {LAYERS - 1} did not come from the host pool"):
        schedule.step()


def run_steps(schedule: Schedule) -> None:
    for step in range(170):
        # Now and then nobody comes for a while, so that layers come back.
        if step % 80 < 50 and len(schedule.waiting) < 2 and schedule.random.random() < 0.7:
            schedule.arrive()
        schedule.step()
        assert schedule.tiers.audit()["requests"] == len(schedule.running)
    assert schedule.tiers.poisoned > 100


@pytest.mark.parametrize(
    "slowly", [False, True], ids=["layers return at once", "layers return a page or two a step"]
)
def test_every_token_that_is_read_is_the_one_that_was_written(slowly, device):
    seen: Counter[str] = Counter()
    for seed in range(5):
        schedule = Schedule(seed, slowly, device)
        run_steps(schedule)
        seen.update(schedule.seen)
    assert (seen.pop("came back slowly") > 0) == slowly
    assert all(count > 0 for count in seen.values()), seen


@pytest.mark.parametrize("loading", ["elastic", "plain"])
def test_layers_that_always_are_offloaded_read_the_same(loading, device):
    schedule = Schedule(1, False, device, loading)
    run_steps(schedule)
    stats = schedule.tiers.stats()
    # They were moved before the first step.
    assert stats["resident_layers"] == LAYERS - MIRRORED and stats["layer_moves"] == MIRRORED
    # A page that a step begins holds nothing to fetch, so it is no miss.
    assert (stats["hit_rate"] < 0.1) == (loading == "plain")


def test_readers_of_another_layer_s_kv_find_it_where_the_staging_areas_do_not_hold_all_rows(device):
    schedule = Schedule(2, False, device, "elastic")
    schedule.random.choice = lambda _: 13
    schedule.waiting = [Request(str(i), schedule.new_tokens(78), answer=0) for i in range(3)]
    for _ in range(7):
        schedule.step()
    assert schedule.groups == 3 and not schedule.running
