"""Which models are in a result of a living pool, and which are not: by the pins in its plan."""

from contextlib import suppress
from typing import NamedTuple

from ties_ray.errors import InputError, Problem, enumerated
from ties_ray.planning.plan import Plan
from ties_ray.state import pool_document
from ties_ray.state.pool_document import NAME, RESULTS, PoolDocument, PoolMember
from ties_ray.stores import Pin, Stores, last_part


class Membership(NamedTuple):
    """What the plan of a pool's result says of the pool's models."""

    members: list[str] = []
    """Folders of the models that it merges, each with the pins that the pool's document has."""
    absent: list[str] = []
    """Folders of dropped models of which it names no file."""
    problems: list[Problem] = []
    notes: list[str] = []


def pool_of(output: str) -> str:
    """Return the pool's folder to which a folder of results would belong; empty where it lies elsewhere."""
    results, _, run_id = output.rstrip("/").rpartition("/")
    return results.rpartition("/")[0] if last_part(results) == RESULTS and pool_document.is_run_id(run_id) else ""


def current_result(stores: Stores, folder: str) -> str:
    """Return the current result of a pool, and a folder that is no pool as it is."""
    with suppress(InputError):
        document, _ = pool_document.read(stores, folder)
        return pool_document.place_of(folder, document.result.run_id) if document else folder
    return folder  # a bucket may forbid to look for what is not there


def membership(stores: Stores, output: str, plan: Plan | None) -> Membership:
    """Return what the plan of an output says of the models of its pool; nothing where it belongs to none.

    It compares all pins: those of the models that were read for it, and of those before from which it goes on.
    """
    pool = pool_of(output)
    try:
        document = pool_document.read(stores, pool)[0] if pool else None
    except InputError as error:
        return Membership(problems=list(error.problems))
    if document is None:
        return Membership()
    if plan is None:
        return Membership(notes=[f"without its plan, nothing shows which models of {pool} it holds"])
    earlier = plan.catalog.earlier
    pins = {**(earlier.inputs if earlier else {}), **{model.id: model.pins for model in plan.catalog.models}}
    result = next((each for each in document.results if each.run_id == plan.run_id), None)
    numbers = set((result or document.result).members)
    return _compare(document, pool, numbers, pins)


def _compare(document: PoolDocument, pool: str, numbers: set[int], pins: dict[str, tuple[Pin, ...]]) -> Membership:
    members = {each.entry.id or "": each for each in document.members if each.number in numbers}
    made = Membership([], [], [], [])
    for id_, member in members.items():
        if pins.get(id_) == member.pins:
            made.members.append(member.uri)
        else:
            message = f"its plan names other files for {id_} than {NAME}"
            made.problems.append(Problem(member.uri, message, "drop the model, and add it again"))
    files = {_content(pin) for each in pins.values() for pin in each}
    for dropped in (each.member for each in document.dropped):
        if any(dropped.uri == member.uri for member in document.members):
            continue  # it is a member again
        if held := _held(dropped, files):
            message = f"is merged in it by {enumerated(held)}, though the pool has dropped it"
            made.problems.append(Problem(dropped.uri, message, f"`ties-ray pool drop {pool} ID --erase` removes it"))
        else:
            made.absent.append(dropped.uri)
    ids = {each.member.entry.id for each in document.dropped}
    if strangers := sorted(pins.keys() - members.keys() - ids):
        message = f"its plan names {enumerated(strangers)}, which {NAME} does not"
        made.problems.append(Problem(pool, message, "add a model to the pool, which makes another result"))
    return made


def _held(member: PoolMember, files: set[tuple[str, ...]]) -> list[str]:
    """Return the files of a model that are among some, by place or by content."""
    return [last_part(pin.uri) for pin in member.pins if _content(pin) in files]


def _content(pin: Pin) -> tuple[str, ...]:
    """Return what tells the content of a file: its mark and size wherever it lies, else its place."""
    return (pin.etag, str(pin.size)) if pin.etag else (pin.uri,)
