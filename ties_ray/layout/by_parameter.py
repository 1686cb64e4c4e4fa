"""What a method is told of each parameter: weights, densities and lambda, as the recipe gives them there."""

from collections.abc import Iterator, Sequence
from functools import cached_property

from ties_ray.errors import Problem
from ties_ray.inputs.catalog import Catalog, Model
from ties_ray.layers import depths
from ties_ray.methods import Member, Method, Threshold
from ties_ray.recipe.coefficients import value_for


class ByParameter:
    """The numbers of one merge by parameter; parameters go by their index in the catalog."""

    def __init__(self, method: Method, catalog: Catalog, members: tuple[Member, ...], models: Sequence[Model]) -> None:
        """models: those of the members."""
        self._method = method
        self._catalog = catalog
        self._members = members
        self._models = models
        self.differ = bool(catalog.lambdas) or any(model.weights or model.densities for model in models)
        """Whether any number differs by parameter."""
        self._resolved: dict[int, tuple[Method, tuple[Member, ...]]] = {}
        self._needs: dict[int, Threshold | None] = {}

    @cached_property
    def _depths(self) -> dict[str, float]:
        return depths(parameter.name for parameter in self._catalog.parameters)

    def depth(self, parameter: int) -> float:
        """Return how deep a parameter lies in its stack of layers; see `Context.depth`."""
        return self._depths.get(self._catalog.parameters[parameter].name, 0.0)

    def method(self, parameter: int) -> Method:
        """Return the method, with the lambda for a parameter."""
        return self._of(parameter)[0] if self.differ else self._method

    def members(self, parameter: int) -> tuple[Member, ...]:
        """Return the members, with their weights and densities for a parameter."""
        return self._of(parameter)[1] if self.differ else self._members

    def need(self, parameter: int) -> Threshold | None:
        """Return the threshold that the method needs for a parameter."""
        key = parameter if self.differ else 0
        if key not in self._needs:
            self._needs[key] = self._method.needs(self.members(parameter))
        return self._needs[key]

    def first_need(self) -> Threshold | None:
        """Return the threshold that the method needs for the first parameter for which it needs any."""
        return next(filter(None, map(self.need, self._merged)), None)

    def density(self, member: int, parameter: int) -> float:
        """Return the share that trim keeps of a member in a parameter; 1 where nothing is trimmed."""
        need = self.need(parameter)
        return need.densities[member] if need else 1.0

    def trimmed(self) -> list[int]:
        """Return the members that are trimmed in any parameter."""
        needs = [need for parameter in self._merged if (need := self.need(parameter))]
        return [member for member in range(len(self._members)) if any(need.densities[member] < 1 for need in needs)]

    @cached_property
    def _merged(self) -> list[int]:
        """The parameters that matter: one stands for all where no number differs."""
        merged = [index for index, parameter in enumerate(self._catalog.parameters) if parameter.merged]
        return merged if self.differ else merged[:1]

    def problems(self) -> Iterator[Problem]:
        """Yield what the method finds wrong with the members of any parameter, each problem once."""
        earlier = self._catalog.earlier.members if self._catalog.earlier else ()
        combinations = dict.fromkeys((*earlier, *self.members(parameter)) for parameter in self._merged)
        yield from dict.fromkeys(problem for members in combinations for problem in self._method.problems(members))
        need = self.first_need()
        if need and need.scope == "global" and any(model.densities for model in self._models):
            message = "densities differ by parameter, and trim cuts the whole task vector at one threshold"
            yield Problem("method.trim", message, "use trim: tensor, or one density for a model")

    def _of(self, parameter: int) -> tuple[Method, tuple[Member, ...]]:
        if parameter not in self._resolved:
            self._resolved[parameter] = self._resolve(parameter)
        return self._resolved[parameter]

    def _resolve(self, parameter: int) -> tuple[Method, tuple[Member, ...]]:
        name, depth = self._catalog.parameters[parameter].name, self.depth(parameter)
        if not self._catalog.parameters[parameter].changed:  # zeros, to which no method may object
            return self._method, tuple(member._replace(weight=1.0) for member in self._members)
        members = []
        for member, model in zip(self._members, self._models, strict=True):
            weight = value_for(model.weights, name, depth)
            density = value_for(model.densities, name, depth)
            weight = member.weight if weight is None else weight
            members.append(Member(member.id, weight, member.density if density is None else density))
        lambda_ = value_for(self._catalog.lambdas, name, depth)
        method = self._method if lambda_ is None else self._method.model_copy(update={"lambda_": lambda_})
        return method, tuple(members)
