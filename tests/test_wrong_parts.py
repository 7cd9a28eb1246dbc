"""Wrong parts of strangers, when they are used: one clear error that names the distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
from strangers import GOOD, TINY, Command, Install, run

from cssbench import registry


def test_a_name_that_is_a_path_is_refused_and_writes_nothing(install: Install, command: Command, tmp_path: Path):
    install("odd-pack", "[cssbench.methods]\n../../mine = fine:Mine\n", {"fine.py": GOOD})
    code, _, err = run(command, tmp_path, "../../mine")
    assert code == 2
    assert "A name is made of letters, digits" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugin-data")


def method(body: str, config: str = "") -> str:
    """A method with a right loss, and `body`, indented by four, below it."""
    return f"{GOOD}{config}{body}"


HOOK = "    def {}:\n        {}\n"
RIGHT = "ctx.model.loss(batch.output, batch.labels)"
METHODS: dict[str, tuple[str, str]] = {
    "a function": ("def Mine(config):\n    pass\n", "is <function Mine"),
    "no Method": ("class Mine:\n    pass\n", "not a subclass of cssbench.api.Method"),
    "no loss": (f"{GOOD}class Mine(Method):\n    pass\n", "does not define loss, which every method must"),
    "no Config": (method("    class Config:\n        pass\n"), "not a subclass of cssbench.api.Section"),
    "a constructor that raises": (
        method(HOOK.format("__init__(self, config)", "raise ValueError('no')")),
        "cannot be built from its Config: ValueError: no (line 6 of"),
    "a constructor without Config": (method(HOOK.format("__init__(self)", "pass")), "__init__() takes 1"),
    "a tensor as loss": (
        method(HOOK.format("loss(self, ctx, batch)", f"return {RIGHT}['ce']")), "not a tensor of shape ()"),
    "a loss without gradient": (
        method(HOOK.format("loss(self, ctx, batch)", f"return {{'ce': {RIGHT}['ce'].detach()}}")),
        "depends on a trainable parameter"),
    "parameters instead of groups": (
        method(HOOK.format("param_groups(self, ctx)", "return ctx.model.parameters()")), "but it is generator"),
    "a rate in a group": (
        method(HOOK.format("param_groups(self, ctx)", "return [{'params': list(ctx.model.parameters()), 'lr': 1.0}]")),
        "entry 0 has the unknown key 'lr'. Beside params a group may hold head, lr_scale"),
    "a generator in a group": (
        method(HOOK.format("param_groups(self, ctx)", "return [{'params': ctx.model.parameters()}]")),
        "params of entry 0 is generator"),
    "nothing to train": (method(HOOK.format("param_groups(self, ctx)", "return []")), "it holds no parameter"),
    "a parameter twice": (
        method(HOOK.format("param_groups(self, ctx)", "return 2 * [{'params': list(ctx.model.parameters())}]")),
        "it lists a parameter twice"),
    "a word as scale": (
        method(HOOK.format("param_groups(self, ctx)",
                           "return [{'params': list(ctx.model.parameters()), 'lr_scale': 'x'}]")),
        "lr_scale of entry 0 is str"),
    "no state": (method(HOOK.format("state_dict(self)", "return None")), "but it is NoneType"),
    "a state that is no data": (
        method(HOOK.format("state_dict(self)", "return {'a': [1, object()]}")), "but state['a'][1] is of type object"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", METHODS)
def test_a_wrong_method_is_one_clear_error(install: Install, command: Command, tmp_path: Path, data: Path, wrong: str):
    source, said = METHODS[wrong]
    install("wrong-pack", {"methods": {"mine": "wrong_method:Mine"}}, {"wrong_method.py": source})
    code, _, err = run(command, tmp_path, "mine", data=data)
    assert code == 2
    assert said in err
    assert "method 'mine' of the distribution 'wrong-pack'" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists(), "nothing is written"


MODEL = (
    "from cssbench.api import *\nclass Mine(Segmenter):\n    multiple = 1\n"
    "    def grow(self, step):\n        import torch\n        self.heads.append(torch.nn.Conv2d(3, 1, 1))\n"
)
MODELS: dict[str, tuple[str, str]] = {
    "no Segmenter": ("class Mine:\n    pass\n", "not a subclass of cssbench.api.Segmenter"),
    "no forward": (MODEL, "model 'mine' of the distribution 'wrong-pack' (class Mine) does not define forward (or "
                   "encode and decode) and loss"),
    "a tensor as output": (
        MODEL + "    def forward(self, images):\n        return self.heads[0](images)\n"
        "    def loss(self, output, labels, *, weight=None):\n        return {'ce': output.mean()}\n",
        "Mine.forward must return a cssbench.api.SegOutput, not a tensor of shape (4, 1, 32, 32)"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MODELS)
def test_a_wrong_model_is_one_clear_error(install: Install, command: Command, tmp_path: Path, data: Path, wrong: str):
    source, said = MODELS[wrong]
    install("wrong-pack", {"models": {"mine": "wrong_model:Mine"}}, {"wrong_model.py": source})
    recipe = tmp_path / "own.toml"
    text = '[scenario]\nname = "synthetic-10-5"\n[method]\nname = "finetune"\n[model]\nname = "mine"\n'
    recipe.write_text(text + '[train]\niterations = 1\naccelerator = "cpu"\n')
    words = [word for word in TINY if not word.startswith("model.")]
    while "--set" in words:
        words.remove("--set")
    words = [word for change in (*words, "data.options.classes=20") for word in ("--set", change)]
    code, _, err = command("run", recipe, "--data", data, "--out", tmp_path / "out", *words)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_wrong_dataset_is_one_clear_error(install: Install, command: Command, tmp_path: Path):
    source = "from cssbench.api import SegDataset\nclass Mine(SegDataset):\n    def layout(self):\n        return ''\n"
    install("wrong-pack", {"datasets": {"mine": "wrong_data:Mine"}}, {"wrong_data.py": source})
    code, _, err = command("data", "verify", tmp_path, "--dataset", "mine")
    assert code == 2
    assert "dataset 'mine' of the distribution 'wrong-pack' (class Mine) does not define folders" in err


@pytest.mark.parametrize("hook", ["start_step(self, ctx)", "param_groups(self, ctx)", "loss(self, ctx, batch)",
                                  "end_step(self, ctx)", "state_dict(self)"])  # fmt: skip
def test_an_exception_in_a_hook_says_whose_it_is_and_keeps_its_traceback(
    install: Install, command: Command, tmp_path: Path, data: Path, hook: str
):
    source = method(HOOK.format(hook, "return {}['a key']"))
    install("wrong-pack", {"methods": {"mine": "wrong_method:Mine"}}, {"wrong_method.py": source})
    with pytest.raises(KeyError) as caught:
        run(command, tmp_path, "mine", data=data)
    name = hook.split("(")[0]
    assert caught.traceback[-1].name == name
    (note,) = caught.value.__notes__
    assert f"raised in Mine.{name} (the method 'mine' of the distribution 'wrong-pack')" in note
    assert "pip uninstall wrong-pack" in note


def test_a_checked_method_is_still_its_own_class(install: Install):
    from cssbench.config import PartChoice
    from cssbench.contract import build_method

    install("pack", {"methods": {"mine": "right_method:Mine"}}, {"right_method.py": GOOD})
    made = build_method(PartChoice(name="mine"))
    assert isinstance(made, registry.load("methods", "mine"))
    assert type(made).__name__ == "Mine"
    assert made.state_dict() == {}
