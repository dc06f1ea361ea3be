"""Choose what to load: the state dict of a file that fits the model, or for each tower the one that does.

The state dict itself comes first. If it does not fit, the state dicts within it are tried: first each for the whole
model, then for each tower alone. Nothing is guessed: if two fit, the load is refused and the message names both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from keymap.advice import choices
from keymap.errors import DetectionError, KeymapError, PlanError, some
from keymap.language.layout import Layout
from keymap.plan.describe import Described, describe
from keymap.plan.join import Chosen, Fit, join
from keymap.plan.model import ModelView
from keymap.plan.own_names import is_foreign, own_reading, own_reading_below, own_reading_of, with_own_parts
from keymap.plan.plan import Plan
from keymap.plan.planner import make_plan
from keymap.plan.request import Request, hub_towers
from keymap.plan.to_hub import to_hub, tower_of
from keymap.source.detect import ambiguous
from keymap.source.opened import Opened, Source
from keymap.source.other_hubs import naming_models_format, naming_other_hubs

__all__ = ["choose", "choose_for_towers"]

_FAULTS_OF_EACH = 3  # faults that a message lists for each of several state dicts
_Group = Sequence[Source]


def choose(opened: Opened, model: ModelView, request: Request) -> Chosen:
    """The plan for the one state dict of a file that fits the model, or for one state dict for each tower.

    Raises:
        DetectionError: no format matches anything in the file.
        PlanError: nothing in the file fits the model, or several state dicts do.
    """
    trial = _Trial(opened, model, request)
    found = trial.first() or trial.own() or trial.chosen_whole() or trial.within()
    if isinstance(found, Chosen):
        return found
    if found is not None:
        plan, source = found
        others = (*plan.other_wrappers, *trial.others([source]))
        return Chosen(replace(plan, other_wrappers=tuple(dict.fromkeys(others))), source.unwrapped.tensors)
    error = trial.error()
    if not is_foreign(trial.hub, model):  # the refusal of a foreign one says so already
        error = naming_models_format(error, opened, model.layouts())
    raise naming_other_hubs(error, opened, model.layouts()) if isinstance(error, DetectionError) else error


def choose_for_towers(opened: Mapping[str, Opened], model: ModelView, request: Request) -> Chosen:
    """The plan for towers that the caller takes from one state dict each; small towers are looked for beside them.

    Raises:
        PlanError: a state dict has no such tower, or it does not fit.
    """
    parts: dict[str, Fit] = {}
    for tower, one in opened.items():
        trial = _Trial(one, model, request._replace(towers=(tower,), within_towers=True))
        found = trial.first() or trial.only(trial.fits(trial.request))
        if found is None:
            raise trial.error()
        parts[tower] = found
    return _Trial(next(iter(opened.values())), model, request).joined(parts)


class _Trial:
    """Plans for the state dicts of a file. Each is made once."""

    def __init__(self, opened: Opened, model: ModelView, request: Request) -> None:
        top = tuple(with_own_parts(source, model) for source in opened.top)
        self.opened, self.model, self.request = replace(opened, top=top), model, request
        self.hub = opened.known.hub
        self.own_below: Source | None = None
        self._sources: dict[int, Source] = {}  # they live as long as their ids are used
        self._hub_views: dict[int, tuple[Mapping[str, Layout], Described]] = {}
        self._done: dict[tuple[object, ...], Plan | KeymapError] = {}

    def plan(self, source: Source, request: Request) -> Plan | KeymapError:
        """The plan for one reading of a state dict, or why it does not fit."""
        self._sources[id(source)] = source
        what = (id(source), request.strict, request.towers, request.elsewhere)
        if what not in self._done:
            try:
                self._done[what] = make_plan(source, self.model, request)
            except KeymapError as error:
                self._done[what] = error
        return self._done[what]

    def top(self) -> Fit | None:
        """The one reading of the state dict itself that fits; None if none does."""
        return self._one_reading(self.opened.top, self._fitting(self.opened.top, self.request))

    def first(self) -> Fit | None:
        """As `top`; a state dict that the caller chose and that lacks a head is tried with the one above it."""
        found = self.top()
        if self.opened.chosen and (found is None or found[0].missing_keys):
            return self.with_heads_above(self.request, [self.opened.top]) or found
        return found

    def _fitting(self, sources: Iterable[Source], request: Request) -> list[Fit]:
        """The readings that fit."""
        plans = ((self.plan(source, request), source) for source in sources)
        return [(plan, source) for plan, source in plans if isinstance(plan, Plan)]

    def _one_reading(self, sources: _Group, found: Sequence[Fit]) -> Fit | None:
        """The one of several readings of the same keys that fits; with a warning if other formats have these keys.

        Args:
            sources: the readings.
            found: those that fit.

        Raises:
            PlanError: several fit.
        """
        if len(found) > 1:
            names = choices("mapping", [plan.format for plan, _ in found])
            raise PlanError(
                f"{self.request.file}: {len(found)} formats match the file and fit the model; choose one with {names}"
            )
        if not found:
            return None
        plan, source = found[0]
        others = [one.found.mapping.name for one in sources if one is not source and one.found is not None]
        if others:
            text = f"the keys are those of {plan.format} and of {', '.join(others)}; only {plan.format} fits the model"
            choose = f"choose with {choices('mapping', others)}"
            warning = f"format: {text}; if the file is another one, embeddings will differ; {choose}"
            plan = replace(plan, warnings=(*plan.warnings, warning))
        return plan, source

    def own(self) -> Fit | None:
        """The state dict itself under the model's own names, whatever its format seems to be.

        A model with adapters or scales has the names by which a mapping refuses a file; its own file is not refused.
        A module of the model that was saved alone is found by its names, too.
        """
        top, foreign = self.opened.top[0], is_foreign(self.hub, self.model)
        if self.opened.named or (foreign and top.refused):
            return None
        source = own_reading(top, self.model, foreign)
        if source is None and not foreign:
            source = self.own_below = self._below(top)
        if source is None:
            return None
        plan = self.plan(source, self.request)
        if isinstance(plan, KeymapError):
            if foreign:
                raise naming_models_format(plan, self.opened, self.model.layouts())
            return None
        return (plan, source) if foreign or source is self.own_below or not plan.unexpected_keys else None

    def _below(self, source: Source) -> Source | None:
        """The state dict as a module of the model that was saved alone; None if it is not, or is not asked for."""
        if source.refused or self._has_keys_of_the_model(source):
            return None
        below = own_reading_below(source, self.model)
        if below is None or below.found is None:
            return None
        towers = {tower_of(self.hub, key) for key in below.found.tensors}
        return below if any(map(self.request.includes, towers)) else None

    def _has_keys_of_the_model(self, source: Source) -> bool:
        """Whether a reading under a format's names is one that may fit the model."""
        if source.found is None:
            return False
        return source.found.mapping is not self.hub or any(key in self.model.tensors for key in source.found.tensors)

    def chosen_whole(self) -> Fit | None:
        """The state dict that the caller chose, where only other state dicts within it keep it from fitting."""
        if not self.opened.chosen or self.opened.top[0].found is None:
            return None
        return self._first_that_fits(self.opened.top, self.request)

    def within(self) -> Fit | Chosen | None:
        """What fits within the state dict: as strict first; in part only where no format matches the whole.

        Nothing is taken in part from a file of which a mapping refuses something: the rest of it would be a half.
        """
        strict = self.request._replace(strict=True)
        top = self.opened.top[0]
        in_part = not self.request.strict and top.found is None and not top.refused and not self.opened.refused
        for request in (strict, self.request) if in_part else (strict,):
            whole = self.only(self.fits(request))
            parts = self._parts(whole) or self.by_tower(request) or self.with_own_beside(request)
            if not parts:
                whole = self.with_heads_above(request)
                parts = self._parts(whole)
            if whole is not None or parts:
                self._refuse_rivals(parts)
                return whole or self.joined(parts)
        return None

    def _parts(self, fit: Fit | None) -> dict[str, Fit]:
        """One state dict for all towers of the model; empty for none."""
        return dict.fromkeys(self.towers, fit) if fit is not None else {}

    @property
    def groups(self) -> list[_Group]:
        """The readings of the state dict, if a format matches it, and of the state dicts within it."""
        top = [self.opened.top] if self.opened.top[0].found is not None else []
        return [*top, *self.opened.inner] if self.opened.inner else []

    def fits(self, request: Request, groups: Iterable[_Group] | None = None) -> list[Fit]:
        """What fits, of each state dict the first reading; those that load the same tensors once."""
        by_tensors: dict[frozenset[int], Fit] = {}
        for group in self.groups if groups is None else groups:
            fit = self._first_that_fits(group, request)
            if fit is not None:
                plan, source = fit
                tensors = source.unwrapped.tensors
                used = frozenset(id(tensors[piece.source]) for piece in plan.pieces if piece.source is not None)
                by_tensors.setdefault(used, fit)
        return list(by_tensors.values())

    def _first_that_fits(self, group: _Group, request: Request) -> Fit | None:
        """The first reading of a state dict that fits."""
        request = self._within(group, request)
        whole = [source for source in group if not source.alone]
        fits = [fit for fit in self._fitting(whole, request) if not self._leaves_out(*fit)]
        if fits:
            return self._one_reading(whole, fits)
        for source in (source for source in group if source.alone):
            for fit in self._fitting([source], request):
                if not self._leaves_out(*fit):
                    return fit
        return None

    def _within(self, group: _Group, request: Request) -> Request:
        """The request for a state dict: others within it are not unexpected there."""
        start = group[0].unwrapped.start
        inner = (other[0].unwrapped.start for other in self.opened.inner)
        elsewhere = tuple(dict.fromkeys(other for other in inner if other != start and other.startswith(start)))
        return request._replace(elsewhere=elsewhere)

    def _leaves_out(self, plan: Plan, source: Source) -> bool:
        """Whether a load in part would leave out what the file seems to hold."""
        if source.alone and plan.unexpected_keys:
            return True
        return bool(source.unwrapped.outside) and any(key in self.opened.searched for key in plan.missing_keys)

    def only(self, found: Sequence[Fit], what: str = "") -> Fit | None:
        """The only one of those that fit; None for none."""
        if len(found) > 1:
            names = choices("wrapper", [source.unwrapped.wrapper for _, source in found])
            raise PlanError(
                f"{self.request.file}: {len(found)} state dicts in the file fit the model{what}; choose one with "
                f"{names}"
            )
        return found[0] if found else None

    def by_tower(self, request: Request) -> dict[str, Fit]:
        """For each tower the one state dict that fits it; empty if a tower fits nowhere."""
        parts: dict[str, Fit] = {}
        towers = [tower for tower in self.towers if tower in self.hub.layouts]
        if len(towers) < 2 or len(self.groups) < 2:
            return {}
        for tower in towers:
            fit = self.only(self.fits(request._replace(towers=(tower,))), f" for the {tower} tower")
            if fit is None:
                return {}
            parts[tower] = fit
        if len({id(source) for _, source in parts.values()}) < 2:  # one state dict that does not fit as a whole
            return {}
        for tower, (_, source) in parts.items():
            if any(other != tower and parts[other][1] is not source for other in self.towers_in(source) & parts.keys()):
                return {}  # half of one model and half of another
        return parts

    def _refuse_rivals(self, chosen: Mapping[str, Fit]) -> None:
        """Refuse to choose between towers of the same sizes, of which only one fits: a tuned one may have a new head.

        Args:
            chosen: for each tower the state dict that it would come from.

        Raises:
            PlanError: there is another one in the file; the message names both, and why the other does not fit.
        """
        for tower, (_, source) in chosen.items():
            own = self._described(source).get(tower)
            if own is None:
                continue
            used = self._tensors_of(source, tower)
            for rival, refusal in (*((g[0], None) for g in self.groups), *self.opened.refused):
                other = self._described(rival).get(tower)
                if other is None or not other.same_sizes(own) or used & self._tensors_of(rival, tower):
                    continue
                plan = self.plan(rival, self.request._replace(strict=True, towers=(tower,)))
                error = refusal or (plan if isinstance(plan, KeymapError) else None)
                faults = (error.faults or (error.summary,))[:1] if error is not None else ()
                name = rival.unwrapped.wrapper
                raise PlanError(
                    f"{self.request.file}: 2 state dicts in the file have the {tower} tower in the model's sizes; "
                    f"choose one with {choices('wrapper', [source.unwrapped.wrapper, name])}",
                    [f"wrapper={name!r} does not fit: {fault}" for fault in faults],
                )

    def _described(self, source: Source) -> Described:
        """The towers of a state dict."""
        return self._hub_view(source)[1]

    def _hub_view(self, source: Source) -> tuple[Mapping[str, Layout], Described]:
        """A state dict under the hub's names, and its towers."""
        if id(source) not in self._hub_views:
            self._sources[id(source)] = source
            numbers = source.settings.numbers
            hub_keys = to_hub(source.found, numbers).tensors if source.found is not None else {}
            self._hub_views[id(source)] = hub_keys, describe(self.opened.known, hub_keys)
        return self._hub_views[id(source)]

    def _tensors_of(self, source: Source, tower: str) -> set[int]:
        """The ids of the tensors that make up a tower."""
        layouts, tensors = self._hub_view(source)[0], source.unwrapped.tensors
        return {id(tensors[n]) for k, lay in layouts.items() if tower_of(self.hub, k) == tower for n in lay.sources}

    def with_own_beside(self, request: Request) -> dict[str, Fit]:
        """What fits all towers of the model, where the model has further modules and their tensors lie beside it."""
        if not self._own_shapes or not request.includes(""):
            return {}
        return self._parts(self.only(self.fits(request._replace(towers=tuple(self.towers)))))

    def with_heads_above(self, request: Request, among: Sequence[_Group] | None = None) -> Fit | None:
        """What fits with heads of the hub that lie above its state dict, as an output layer above a language model."""
        shapes = {key: tuple(tensor.shape) for key, tensor in self.model.tensors.items() if self._is_head(key)}
        if not shapes:
            return None
        more = ([self.opened.with_above(source, shapes) for source in group] for group in among or self.groups)
        groups = [[source for source in group if source is not None] for group in more]
        return self.only(self.fits(request, [group for group in groups if group]))

    def _is_head(self, key: str) -> bool:
        return any(side.match(key) is not None for side in self.hub.heads)

    @cached_property
    def _own_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's keys that belong to no tower."""
        return {key: tuple(value.shape) for key, value in self.model.tensors.items() if not tower_of(self.hub, key)}

    def _own_beside(self, starts: Sequence[str]) -> Fit | None:
        """The plan for the model's keys of no tower, where the file has them beside state dicts."""
        tensors = self.opened.beside_own(self._own_shapes, starts) if self._own_shapes else {}
        if not tensors:
            return None
        source = own_reading_of(self.opened.top[0], tensors, self._own_shapes)
        plan = self.plan(source, self.request._replace(towers=("",)))
        return (plan, source) if isinstance(plan, Plan) else None

    def towers_in(self, source: Source) -> set[str]:
        """The towers that a state dict has, whether they fit the model or not."""
        return set(self._described(source))

    @property
    def towers(self) -> list[str]:
        """The towers of the model that are to be loaded."""
        towers = {tower_of(self.hub, key) for key in self.model.tensors}
        return [tower for tower in hub_towers(self.hub) if tower in towers and self.request.includes(tower)]

    def joined(self, parts: Mapping[str, Fit]) -> Chosen:
        """One plan for towers from several state dicts, with the small towers that lie beside them.

        Raises:
            PlanError: the model has further keys, which the file lacks.
        """
        sources = list({id(source): source for _, source in parts.values()}.values())
        found = list({id(plan): (plan, source) for plan, source in parts.values()}.values())
        starts = [source.unwrapped.start for source in sources]
        small = tuple(tower for tower in self.towers if tower not in parts and tower not in self.hub.layouts)
        if small:
            request = self.request._replace(towers=small)
            beside = self.opened.beside(small, starts)
            for source in (*sources, *([beside] if beside is not None else [])):
                plan = self.plan(source, request)
                if isinstance(plan, Plan):
                    found.append((plan, source))
                    break
        own = self._own_beside(starts) if self.request.includes("") else None
        found += [own] if own is not None else []
        return join(self.hub, found, self.model, self.request, self.others(sources))

    def others(self, used: Iterable[Source]) -> list[str]:
        """The paths of the state dicts in the file that are not used, for the report."""
        starts = [source.unwrapped.start for source in used]
        unused = [
            group[0].unwrapped
            for group in self.opened.found_inside
            if not any(s.startswith(group[0].unwrapped.start) or group[0].unwrapped.start.startswith(s) for s in starts)
        ]
        return [unwrapped.wrapper for unwrapped in unused if unwrapped.wrapper]

    def error(self) -> KeymapError:
        """Why nothing fits: of the state dict itself if a format matches it, or of each one within it."""
        top = self.opened.top
        if len(top) > 1:
            return ambiguous([source.found for source in top if source.found is not None], self.request.file)
        if self.own_below is not None:
            top = (self.own_below,)
        if top[0].found is None and not top[0].refused and self.opened.refused:
            return self.opened.refused[0][1]
        if top[0].found is not None or top[0].refused or not self.opened.inner:
            found = self.plan(top[0], self.request)
            assert isinstance(found, KeymapError), "it was tried before"
            return found
        errors = self._errors_by_tower() or self._errors(self.request._replace(strict=True), self.opened.inner)
        if len(errors) == 1:
            return errors[0][0]
        if not errors:
            return self._half()
        faults = [
            f"wrapper={source.unwrapped.wrapper!r}: {fault}"
            for error, source in errors
            for fault in (error.faults or (error.summary,))[:_FAULTS_OF_EACH]
        ]
        summary = f"{self.request.file}: none of the {len(errors)} state dicts in the file fits the model"
        return PlanError(summary, [*self._advice(), *faults])

    def _half(self) -> KeymapError:
        """Why a state dict that fits in part is not loaded: the file seems to hold what would be left out."""
        faults = []
        for group in self.opened.inner:
            plan, base = self.plan(group[0], self._within(group, self.request)), self.opened.searched
            if isinstance(plan, Plan):
                lacking = [f"{key} {list(base[key].shape)} of the file" for key in plan.missing_keys if key in base]
                wrapper = group[0].unwrapped.wrapper
                faults.append(f"wrapper={wrapper!r} would leave out {some(lacking or plan.unexpected_keys)}")
        text = (
            "no state dict in the file fits the model as a whole; to load one without the rest, choose it with wrapper="
        )
        return PlanError(f"{self.request.file}: {text}", faults)

    def _errors(self, request: Request, groups: Iterable[_Group]) -> list[tuple[KeymapError, Source]]:
        """Why state dicts do not fit; those that do are left out."""
        plans = [(self.plan(group[0], self._within(group, request)), group[0]) for group in groups]
        return [(found, source) for found, source in plans if isinstance(found, KeymapError)]

    def _errors_by_tower(self) -> list[tuple[KeymapError, Source]]:
        """Why towers do not fit, where each lies in a state dict of its own; empty if that is not so."""
        found: list[tuple[KeymapError, Source]] = []
        starts: list[str] = []
        for tower in (tower for tower in self.towers if tower in self.hub.layouts):
            groups = [group for group in self.opened.inner if self.towers_in(group[0]) == {tower}]
            if len(groups) != 1:
                return []
            start = groups[0][0].unwrapped.start
            if any(start.startswith(other) or other.startswith(start) for other in starts):
                return []
            starts.append(start)
            found += self._errors(self.request._replace(strict=True, towers=(tower,)), groups)
        return found

    def _advice(self) -> list[str]:
        """Which towers to load, where no state dict of the file has one of the others."""
        present = {tower for group in self.opened.inner for tower in self.towers_in(group[0])}
        if self.request.towers is not None:
            lacking = [tower for tower in self.towers if tower in self.hub.layouts and tower not in present]
            return [f"no state dict in the file has the {' or the '.join(lacking)} tower"] if lacking else []
        absent = [tower for tower in self.towers if tower in self.hub.layouts and tower not in present]
        if not absent or not present or self.request.towers is not None:
            return []
        chosen = ", ".join(repr(tower) for tower in self.hub.layouts if tower in present)
        return [f"the file has no {' or '.join(absent)} tower: load with towers=({chosen},)"]
