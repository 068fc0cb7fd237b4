"""From plans to results: which sets go through images together, what is shown meanwhile, what is printed at the end."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cli import show
from cli.logs import PassLog, pass_log
from featstore.configs import RunConfig, parse_seconds
from featstore.errors import ConfigError, DeviceError, FeatstoreError, Stopped

if TYPE_CHECKING:
    from featstore.backbones.tokens import Backbone
    from featstore.extraction.decoded_cache import Cache
    from featstore.extraction.distributed import Ranks
    from featstore.extraction.loader import Batch
    from featstore.extraction.passes import Pass
    from featstore.extraction.pipeline import Summary
    from featstore.extraction.plan import Plan
    from featstore.extraction.sharded import Lenders
    from featstore.extraction.sharing import Sharing
    from featstore.extraction.stopping import Stop

TOGETHER = 0.5  # share of the free memory that the networks of one pass may take


def make_stop(run: RunConfig) -> "Stop":
    """Whether to end, asked by signals or by the time budget, which counts from now."""
    from featstore.extraction.stopping import Stop

    return Stop(None if run.time_budget is None else parse_seconds(run.time_budget))


def run_plans(plans: "list[Plan]", run: RunConfig, *, quiet: bool, stop: "Stop | None" = None) -> list[dict[str, Any]]:
    """Extract sets, those of one data set in one pass over its images where the networks fit together.

    Over several processes each does its share; where the network itself is sharded over them one reports. Where several
    sets are asked for, one whose images or options cannot do leaves the others alone: its result has `error`.
    """
    from featstore.extraction.stopping import signals

    stop = stop or make_stop(run)
    with signals(stop):
        if run.memory != "shard":
            return _Runs(plans, run, stop, None, quiet=quiet).all()
        from featstore.extraction.pipeline import choose_device
        from featstore.extraction.sharded import Lenders

        lenders = Lenders(plans, run, choose_device(run.device))
        if lenders.rank:
            lenders.serve()
            return []
        try:
            return _Runs(plans, run, stop, lenders, quiet=quiet).all()
        finally:
            lenders.dismiss()


def raise_errors(results: list[dict[str, Any]]) -> None:
    """Raise `ConfigError` that names every set that `run_plans` could not make."""
    broken = [f"{item['set']}: {item['error']}" for item in results if "error" in item]
    if broken:
        rest = ", the others are done" if len(broken) < len(results) else ""
        raise ConfigError(f"{len(broken)} of {len(results)} sets failed{rest}: {'; '.join(broken)}")


class _Runs:
    """The passes of one command."""

    def __init__(
        self, plans: "list[Plan]", run: RunConfig, stop: "Stop", lenders: "Lenders | None", *, quiet: bool
    ) -> None:
        self.plans, self.run, self.stop, self.lenders, self.quiet = plans, run, stop, lenders, quiet
        self.backbones = _Backbones(plans, run, lenders)
        self.passes = 0

    def all(self) -> list[dict[str, Any]]:
        """Results in the order of the plans."""
        results: dict[int, dict[str, Any]] = {}
        waiting = self._groups()
        while waiting:
            group = waiting.pop(0)
            try:
                results.update(self._pass(group))
            except Stopped:
                raise
            except FeatstoreError as error:
                if self._is_everybodys(error, group):
                    raise
                guilty = [number for number in group if self.plans[number].name == error.about] or group
                if len(guilty) < len(group) and not isinstance(error, DeviceError):
                    waiting.insert(0, [number for number in group if number not in guilty])
                elif len(group) > 1:  # each by itself has its own verdict, and the device for itself
                    waiting[:0] = [[number] for number in group]
                    continue
                results.update({number: self._failed(number, error) for number in guilty})
        return [results[number] for number in range(len(self.plans))]

    def _is_everybodys(self, error: FeatstoreError, group: list[int]) -> bool:
        """Whether the next set would meet it too: the store, the weights' files, the device, the other processes."""
        if len(self.plans) == 1 or self.lenders is not None or isinstance(error, OSError):
            return True
        return isinstance(error, DeviceError) and len(group) == 1

    def _failed(self, number: int, error: FeatstoreError) -> dict[str, Any]:
        name = self.plans[number].name
        show.say(f"{name}: error: {error}")
        return {"set": name, "samples": 0, "failed": 0, "blocks": 0, "error": str(error)}

    def _groups(self) -> list[list[int]]:
        """Numbers of the plans of each pass."""
        from featstore.store.layout import network_of

        groups: list[list[int]] = []
        last: list[int] = []
        room: float = 0
        for number, plan in enumerate(self.plans):
            if not len(plan.todo):
                groups.append([number])
                continue
            same = bool(last) and network_of(self.plans[last[-1]].spec) == network_of(plan.spec)
            size = 0 if same else _network_bytes(plan)  # one network serves sets that follow each other
            together = last and self.lenders is None and self.plans[last[0]].manifest.digest == plan.manifest.digest
            if together and (same or size <= room):
                last.append(number)
                room -= size
            else:
                last = [number]
                groups.append(last)
                # Asking the device takes importing torch: where something is to be computed beside something.
                room = 0.0 if len(self.plans) == 1 else TOGETHER * _free_memory(self.run) - size
        return groups

    def _pass(self, group: list[int]) -> dict[int, dict[str, Any]]:
        if not self.run.decoded_cache and not any(len(self.plans[number].todo) for number in group):
            return {number: self._nothing_to_do(self.plans[number]) for number in group}
        return self._compute(group)

    def _nothing_to_do(self, plan: "Plan") -> dict[str, Any]:
        """Of a manifest with nothing new the mapping of its rows may be missing; all without torch."""
        from featstore.extraction.claims import sweep_claims
        from featstore.extraction.prepare import is_prepared, prepare

        if not is_prepared(plan):
            prepare(plan)
        sweep_claims(plan.folder)
        return {"set": plan.name, "samples": 0, "failed": 0, "blocks": 0, "seconds": 0.0, "notes": []}

    def _compute(self, group: list[int]) -> dict[int, dict[str, Any]]:
        from featstore.extraction.distributed import ranks_of

        plans = [self.plans[number] for number in group]
        ranks = ranks_of(self.run)
        todo = sum(len(plan.todo) for plan in plans)
        share = -(-todo // ranks.world)
        label = ", ".join(plan.name for plan in plans) + (f" ({ranks.name})" if ranks.world > 1 else "")
        with pass_log(self.run.log_json, plans, ranks, share) as log:
            return self._logged(plans, group, log, label, share)

    def _logged(
        self, plans: "list[Plan]", group: list[int], log: PassLog, label: str, share: int
    ) -> dict[int, dict[str, Any]]:
        from featstore.extraction.distributed import ranks_of
        from featstore.extraction.pipeline import Hooks

        ranks = ranks_of(self.run)
        fills = self.run.decoded_cache and self.run.engine != "ray"  # there its actors divide that too
        caches, notes = self._fill_caches(plans) if fills else (None, [[] for _ in plans])
        with ExitStack() as stack:
            advance = stack.enter_context(show.progress(label, share)) if share and ranks.speaks else None

            def moved(images: int, failed: int) -> None:
                if advance is not None:
                    advance(images, failed)
                log.advance(images, failed)

            def watch(work: "Pass", sharing: "Sharing") -> "Callable[[Batch], None]":
                log.watch(work, sharing)
                return lambda _: None if advance is None else advance.note(work.stages.line())

            # What the command has used until now belongs to the first pass.
            hooks = Hooks(moved, show.say, watch, self.stop, is_command=not self.passes)
            self.passes += 1
            summaries = self._extract(plans, group, caches, hooks)
            results = {}
            for number, summary, lines in zip(group, summaries, notes):
                summary.notes[:0] = lines
                results[number] = _report(summary, ranks.name, quiet=self.quiet)
                if ranks.world > 1 and ranks.speaks:
                    results[number] |= _whole(self.plans[number], ranks, quiet=self.quiet)
                log.result(results[number])
        return results

    def _extract(self, plans: "list[Plan]", group: list[int], caches: Any, hooks: Any) -> "list[Summary]":
        from featstore.extraction import pipeline
        from featstore.extraction.distributed import ranks_of

        if self.run.engine == "ray":
            from featstore.extraction.ray_engine import run_on_ray

            return run_on_ray(plans, self.run, hooks)

        def network(position: int) -> "Backbone":
            if ranks_of(self.run).speaks and not self.backbones.holds(group[position]):
                show.say(f"{plans[position].name}: loading the backbone")
            return self.backbones.get(group[position], alone=len(group) == 1)

        return pipeline.extract_sets(plans, self.run, backbones=network, caches=caches, hooks=hooks)

    def _fill_caches(self, plans: "list[Plan]") -> "tuple[list[Cache], list[list[str]]]":
        from featstore.extraction import decoded_cache

        caches, notes = [], []
        for plan in plans:
            found = decoded_cache.find_cache(plan.folder.parents[2], plan.manifest, plan.preprocess)
            lacking = len(found.missing(retry_failed=self.run.retry_failed))
            with show.progress(f"{plan.name}: decoding", lacking) as advance:
                cache, lines = decoded_cache.fill_cache(plan, self.run, advance=advance, stop=self.stop)
            caches.append(cache)
            notes.append(lines)
        return caches, notes


def _network_bytes(plan: "Plan") -> int:
    """Memory of a network's weights in the type it computes in."""
    from featstore.store.layout import ITEMSIZE

    return int(plan.source.architecture.num_parameters() * ITEMSIZE[plan.spec["identity"]["compute_dtype"]])


def _free_memory(run: RunConfig) -> int:
    """Bytes free on the device that runs."""
    import torch

    from featstore.backbones.devices import free_bytes
    from featstore.extraction.pipeline import choose_device

    return free_bytes(torch.device(choose_device(run.device))) or 0


class _Backbones:
    """The network of one plan at a time, kept while the next plan computes with the same one in the same type."""

    def __init__(self, plans: "list[Plan]", run: RunConfig, lenders: "Lenders | None"):
        self._plans, self._run, self._lenders = plans, run, lenders
        self._key: str | None = None
        self._held: Backbone | None = None

    def holds(self, number: int) -> bool:
        """Whether the network of a plan is in memory."""
        from featstore.store.layout import network_of

        return self._held is not None and self._key == network_of(self._plans[number].spec)

    def get(self, number: int, *, alone: bool) -> "Backbone":
        from featstore.extraction.creation import load_backbone
        from featstore.extraction.distributed import ranks_of
        from featstore.extraction.pipeline import choose_device
        from featstore.store.layout import network_of

        plan = self._plans[number]
        device = ranks_of(self._run).own_device(choose_device(self._run.device))
        if self._held is not None and self.holds(number):
            return self._held
        if alone:
            self._held = None  # let go of the one before
        backbone = load_backbone(plan, self._run, device) if self._lenders is None else self._lenders.load(number)
        self._held, self._key = backbone, network_of(plan.spec)
        return backbone


def _report(summary: "Summary", who: str, *, quiet: bool) -> dict[str, Any]:
    rate = summary.computed / max(summary.seconds, 1e-9)
    by = f" by {who}" if who else ""
    if not quiet and summary.device:
        print(
            f"  {summary.name}: {summary.computed} computed{by} in {show.duration(summary.seconds)} "
            f"({rate:.1f} images/s on {summary.device}, "
            f"batch {summary.batch_size}), {summary.blocks} blocks committed, {summary.failed} failed"
        )
    if not quiet:
        for note in [*summary.notes, *([summary.comparison] if summary.comparison else [])]:
            print(f"    {note}")
        for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1]):
            print(f"    {count} x {reason}")
    return {
        "set": summary.name,
        "samples": summary.computed,
        "failed": summary.failed,
        "blocks": summary.blocks,
        "seconds": round(summary.seconds, 3),
        "reasons": summary.reasons,
        "notes": summary.notes,
        "comparison": summary.comparison,
    }


def _whole(plan: "Plan", ranks: "Ranks", *, quiet: bool) -> dict[str, Any]:
    """What stands of a set by now, whoever did it: the share of one process says nothing of the failures of others."""
    from featstore.store import commits, ledger

    names = {array.name for array in plan.arrays}
    rows, failed = set(), set()
    for group, arrays in ledger.read_ledger(plan.folder).groups.items():
        if names & {array.name for array in arrays}:
            for commit in commits.read_commits(plan.folder, group).values():
                rows |= set(range(commit.start, commit.stop))
                failed |= set(commit.failed)
    if not quiet:
        print(f"    in all {len(rows)} of {len(plan.manifest)} rows are committed by now, {len(failed)} of them failed")
    return {"rank": ranks.rank, "world": ranks.world, "set_rows": len(rows), "set_failed": len(failed)}
