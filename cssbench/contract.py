"""What a plug-in's method and model must keep, checked where they are built and wherever they answer.

A broken promise (no such hook, a wrong return type) is one PluginError that names the distribution. An exception raised
inside a hook keeps its traceback, which the hook's author needs, and is given a note that says whose hook it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cssbench import recipes, registry
from cssbench.checkpoint import no_data
from cssbench.config import PartChoice, Section, part_config
from cssbench.errors import CssbenchError, PluginError
from cssbench.method import Batch, Method, StepContext
from cssbench.models.segmenter import Segmenter, SegOutput

GROUP_KEYS = {"name", "params", "head", "lr_scale", "weight_decay"}


def method_class(name: str) -> type[Method]:
    """The method `name`. Raises UnknownNameError; PluginError unless it is a Method with a loss and a Config."""
    return _with_config(registry.load_class("methods", name, Method, ["loss"]), "method", name)


def model_class(name: str) -> type[Segmenter]:
    """The model `name`. Raises UnknownNameError; PluginError unless it is a whole Segmenter with a Config."""
    recipes.named_model(name)  # of an unknown name it tells the nearest presets too
    return _with_config(
        registry.load_class("models", name, Segmenter, ["grow", ("forward", "encode", "decode"), "loss"]), "model", name
    )


def _with_config(cls: Any, kind: str, name: str) -> Any:
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, Section)):
        part = registry.find(f"{kind}s", name)
        raise PluginError(
            f"The Config of the {part} is {cls.Config!r}, not a subclass of cssbench.api.Section. "
            f"{registry.remedy(part.distribution, 'Derive it: class Config(Section)')}"
        )
    return cls


def build_method(choice: PartChoice) -> Method:
    """The method chosen by a recipe, its hooks checked. Raises ConfigError for a wrong option, PluginError."""
    cls, part = method_class(choice.name), registry.find("methods", choice.name)
    own = {"part": part, "__module__": cls.__module__, "__doc__": cls.__doc__}
    own["plain_base"] = vars(cls).get("plain_base", False)  # a promise that no subclass inherits, and Checked keeps
    checked = type(cls.__name__, (Checked, cls), own)
    return _build(part, checked, part_config("method", choice, cls.Config))


def build_model(choice: PartChoice) -> Segmenter:
    """The model chosen by a recipe. Raises ConfigError for a wrong option, PluginError."""
    cls = model_class(choice.name)
    return _build(registry.parts("models")[choice.name], cls, part_config("model", choice, cls.Config))


def _build(part: registry.Part, cls: Any, config: Section) -> Any:
    try:
        return cls(config)
    except CssbenchError:
        raise
    except Exception as error:  # a stranger's constructor may raise anything
        raise PluginError(
            f"The {part} cannot be built from its Config: {registry.describe(error)}. "
            f"{registry.remedy(part.distribution, 'Mend its constructor, which is called with the Config alone')}"
        ) from error


class Checked(Method):
    """Stands before a method's class and watches its hooks; `part` says whose it is."""

    part: ClassVar[registry.Part]

    def start_step(self, ctx: StepContext) -> None:
        with self._watch("start_step"):
            super().start_step(ctx)

    def param_groups(self, ctx: StepContext) -> list[dict[str, Any]]:
        with self._watch("param_groups"):
            return super().param_groups(ctx)

    def loss(self, ctx: StepContext, batch: Batch) -> dict[str, Tensor]:
        with self._watch("loss"):
            return super().loss(ctx, batch)

    def after_backward(self, ctx: StepContext) -> None:
        with self._watch("after_backward"):
            super().after_backward(ctx)

    def after_update(self, ctx: StepContext) -> None:
        with self._watch("after_update"):
            super().after_update(ctx)

    def end_step(self, ctx: StepContext) -> None:
        with self._watch("end_step"):
            super().end_step(ctx)

    def state_dict(self) -> dict[str, Any]:
        with self._watch("state_dict"):
            state = super().state_dict()
        wrong = f"it is {_describe(state)}" if not isinstance(state, dict) else no_data(state)
        if wrong:
            raise PluginError(
                f"{whose(self, 'state_dict')} must return a dict of tensors, numbers, strings, and lists and dicts of "
                f"them, but {wrong}. {registry.remedy(self.part.distribution, 'Return only those')}"
            )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with self._watch("load_state_dict"):
            super().load_state_dict(state)

    @contextmanager
    def _watch(self, hook: str) -> Iterator[None]:
        try:
            yield
        except CssbenchError:
            raise
        except Exception as error:
            note = f"This was raised in {whose(self, hook)}"
            if not any(said.startswith("This was raised in ") for said in getattr(error, "__notes__", [])):
                error.add_note(f"{note}. {registry.remedy(self.part.distribution, 'Mend it there')}")
            raise


def whose(method: Method, hook: str) -> str:
    """`Class.hook`, and the name and distribution of the method where they are known."""
    name = f"{type(method).__name__}.{hook}"
    return f"{name} (the {method.part})" if isinstance(method, Checked) else name


def check_terms(method: Method, terms: Any) -> dict[str, Tensor]:
    """What `method.loss` returned. Raises PluginError unless it can be summed up and differentiated."""
    if (
        not isinstance(terms, dict)
        or not terms
        or not all(isinstance(k, str) and isinstance(v, Tensor) and v.ndim == 0 for k, v in terms.items())
    ):
        raise PluginError(
            f"{whose(method, 'loss')} must return a dict of named scalar tensors, not {_describe(terms)}. "
            f'Return for instance {{"ce": loss.mean()}}.'
        )
    if torch.is_grad_enabled() and not any(term.requires_grad for term in terms.values()):
        raise PluginError(
            f"No term that {whose(method, 'loss')} returned ({', '.join(terms)}) depends on a trainable parameter. "
            f"Make them from batch.output, and leave something of ctx.model unfrozen."
        )
    return terms


def check_groups(method: Method, groups: Any) -> list[dict[str, Any]]:
    """What `method.param_groups` returned. Raises PluginError unless an optimiser can be made of it."""
    wrong = wrong_groups(groups)
    if wrong:
        raise PluginError(
            f"{whose(method, 'param_groups')} must return a list of groups "
            f'{{"params": [parameters], ...}}, but {wrong}. '
            f"Beside params a group may hold {', '.join(sorted(GROUP_KEYS - {'params'}))}."
        )
    return groups


def wrong_groups(groups: Any) -> str | None:
    """Why an optimiser cannot be made of what `param_groups` returned, in words; None: it can."""
    if not isinstance(groups, list | tuple):
        return f"it is {_describe(groups)}"
    for index, group in enumerate(groups):
        if not isinstance(group, dict) or "params" not in group:
            return f"entry {index} is {_describe(group)}"
        if unknown := sorted(map(str, group.keys() - GROUP_KEYS)):
            return f"entry {index} has the unknown key {unknown[0]!r}"
        params = group["params"]
        if not isinstance(params, Sequence) or not all(isinstance(p, nn.Parameter) for p in params):
            return f"params of entry {index} is {_describe(params)}"
        if wrong := [k for k in ("lr_scale", "weight_decay") if not isinstance(group.get(k, 0.0), int | float)]:
            return f"{wrong[0]} of entry {index} is {_describe(group[wrong[0]])}"
    listed = [id(p) for group in groups for p in group["params"]]
    if not listed:
        return "it holds no parameter: everything is frozen"
    return "it lists a parameter twice" if len(set(listed)) < len(listed) else None


def check_output(model: nn.Module, output: Any) -> SegOutput:
    """What the model returned. Raises PluginError unless it is a SegOutput."""
    if not isinstance(output, SegOutput):
        raise PluginError(
            f"{type(model).__name__}.forward must return a cssbench.api.SegOutput, not {_describe(output)}. "
            f"Derive a dataclass from SegOutput that defines `scores`, and return one."
        )
    return output


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in value.items()) + "}"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
