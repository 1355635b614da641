"""What is called without a Trainer, entry by entry: from a device to what came out, for comparison between devices."""

import inspect
import pkgutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune
from lightning_prune import analysis, pruning
from lightning_prune.algorithms.solvers import SOLVERS
from lightning_prune.analysis.criterion_comparison import compare_criteria, oracle
from lightning_prune.analysis.latency_comparison import compare_latency
from lightning_prune.analysis.weight_sensitivity import weight_sensitivity
from lightning_prune.model.calls import mode_of
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.pruning import exact, experts, filters, fisher, weights
from lightning_prune.pruning.layer_scores import LAYER_CRITERIA
from lightning_prune.pruning.scoring import CRITERIA
from lightning_prune.structure import find_structure, trace
from lightning_prune.surgery.semi_structured import to_semi_structured_
from tests import mixtures
from tests.simulated_device.nets import NETS, loss, made

Entry = Callable[[str], Any]


def entries() -> dict[str, Entry]:
    """Every entry by name. Registries are enumerated, so that what is added to them is covered."""
    found: dict[str, Entry] = {}
    for criterion in CRITERIA:
        for name in NETS:
            found[f"criterion {criterion} on {name}"] = partial(_filters, name, criterion=criterion)
    for target in get_args(filters.Target):
        for scope in get_args(filters.Scope):
            found[f"target {target}, scope {scope}"] = partial(_filters, "conv", target=target, scope=scope)
    for name in NETS:
        found[f"sandbox on {name}"] = partial(_changed_in_the_sandbox, name)
    found["criterion of one's own"] = partial(_filters, "conv", criterion=lambda weight: weight.abs().flatten(1).sum(1))
    found["repair"] = partial(_filters, "conv", repair=True)
    found["example on the CPU"] = _example_on_cpu
    for solver in SOLVERS:
        for name, how in {"amount": {"amount": 0.5}, "2:4": {"pattern": "2:4"}, "sequential": {"sequential": True},
                          "global": {"scope": "global", "amount": 0.5}}.items():  # fmt: skip
            found[f"solver {solver}, {name}"] = partial(_obs, "conv", solver=solver, **how)
        found[f"solver {solver} on attention"] = partial(_obs, "attention", solver=solver)
        found[f"solver {solver} on lstm"] = partial(_obs, "lstm", solver=solver)
    for criterion in weights.WEIGHT_CRITERIA:
        for scope in get_args(weights.WeightScope):
            found[f"weights {criterion}, scope {scope}"] = partial(_weights, criterion=criterion, scope=scope)
    for criterion in LAYER_CRITERIA:
        found[f"layers {criterion}"] = partial(_layers, criterion=criterion)
    found["layers with repair"] = partial(_layers, repair=True)
    found["weights 2:4"] = partial(_weights, pattern="2:4")
    found["weights by pattern"] = partial(_weights, amount={"first": 0.3})
    for method in get_args(exact.Method):
        found[f"exact {method}"] = partial(_exact, method)
    found |= {f"public {name}": entry for name, entry in PUBLIC.items()}
    found |= {f"analysis {name}": entry for name, entry in ANALYSIS.items()}
    found |= {f"pruning {name}": entry for name, entry in PRUNING.items()}
    return found


def public_functions() -> set[str]:
    """Names of what the package exports and a test of a device may call."""
    return {name for name in lightning_prune.__all__ if inspect.isfunction(getattr(lightning_prune, name))}


def functions_of(package: Any, chosen: Callable[[str, Any], bool]) -> set[str]:
    """Names of a package's exported functions that are chosen by name and function."""
    found = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        own = import_module(module.name)
        for name, function in inspect.getmembers(own, inspect.isfunction):
            if function.__module__ == module.name and not name.startswith("_") and chosen(name, function):
                found.add(name)
    return found


def analyses() -> set[str]:
    """Names of the analysis functions that take a model and are no steps of another."""
    steps = {"begin", "evaluated", "measure_each"}
    return functions_of(analysis, lambda name, function: name not in steps and _takes_model(function))


def pruners() -> set[str]:
    """Names of the functions that prune a model."""
    return functions_of(pruning, lambda name, function: name.startswith("prune_"))


def _takes_model(function: Callable[..., Any]) -> bool:
    return bool({"model", "dense"} & set(inspect.signature(function).parameters))


def looks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Shape, number of zeros and sum of sizes of every parameter and buffer: what devices must agree on."""
    looks = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            value = tensor.cpu().double()
            looks[name] = [list(value.shape), int((value.abs() < 1e-6).sum()), float(value.abs().sum())]
    return looks


def _changed_in_the_sandbox(net: str, device: str) -> list[str]:
    """Name what a run in train mode, as a trace makes it, leaves changed of a model; no device has reason for any."""
    model, _, batches = made(net, device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with undisturbed(model, batches), mode_of(model, training=True):
        model(batches[0][0])
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


def _filters(net: str, device: str, **how: Any) -> Any:
    """Prune filters beside an optimizer with state, then train one step."""
    model, example, batches = made(net, device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loss(model, batches[0]).backward()
    optimizer.step()
    torch.manual_seed(1)
    try:
        report = lightning_prune.prune_filters(
            model, example, 0.02 if how.get("target") == "latency" else 0.4, batches=batches, loss=loss,
            optimizer=optimizer, progress=False, **how,
        )  # fmt: skip
    except lightning_prune.PruningError as error:
        return f"refused: {error}"
    if how.get("target") == "latency":  # what one unit costs differs from call to call
        return "pruned"
    optimizer.zero_grad()
    loss(model, batches[1]).backward()
    optimizer.step()
    return looks_of(model), sorted(report.kept), sorted({pinned.reason for pinned in report.pinned})


def _example_on_cpu(device: str) -> Any:
    """Prune a model by an example that lies on the CPU, which the model itself would not take."""
    model, example, _ = made("conv", device)
    try:
        lightning_prune.prune_filters(model, example.cpu(), 0.4, progress=False)
    except lightning_prune.PruningError as error:
        return device != "cpu" and "on the same device" in str(error)
    return device == "cpu"


def _obs(net: str, device: str, amount: float | None = None, **how: Any) -> Any:
    model, _, batches = made(net, device)
    lightning_prune.prune_obs(model, amount, batches=[x for x, _ in batches], progress=False, **how)
    return looks_of(model)


def _weights(device: str, **how: Any) -> Any:
    """Zero weights, train with them held at zero, save and load."""
    model, _, batches = made("conv", device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(1)
    lightning_prune.prune_weights(model, optimizer=optimizer, **how)
    with lightning_prune.hold_masks(model, optimizer):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return looks_of(model), _through_file(model, device)


def _through_file(model: nn.Module, device: str) -> list[Any]:
    """Save a sparse file and load it, into a model on the device and as a state dict."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        lightning_prune.save_sparse(model, path)
        other = made("conv", device)[0]
        lightning_prune.load_sparse_(other, path)
        loaded = lightning_prune.load_sparse(path)
    expected = model.state_dict()
    same = [torch.equal(loaded[name], tensor.cpu()) for name, tensor in expected.items() if name in loaded]
    return [looks_of(other), all(same), len(same)]


def _layers(device: str, **how: Any) -> Any:
    model, example, batches = made("blocks", device)
    torch.manual_seed(1)
    lightning_prune.prune_layers(model, example, 0.5, batches=batches, loss=loss, progress=False, **how)
    return looks_of(model), [type(module).__name__ for module in model.modules()]


def _experts(device: str) -> Any:
    torch.manual_seed(0)
    model, batches = mixtures.net(), [torch.randn(8, 4) for _ in range(2)]
    model, batches = model.to(device), [batch.to(device) for batch in batches]
    report = experts.prune_experts(model, batches[0][:2], 0.5, batches=batches)
    return looks_of(model), report.proved


def _exact(method: str, device: str) -> Any:
    model, _, batches = made("mlp", device)
    exact.prune_exact(model, 0.5, batches=batches, loss=F.cross_entropy, method=method, progress=False)
    return looks_of(model)


def _fisher(device: str) -> Any:
    model, _, batches = made("mlp", device)
    fisher.prune_fisher(model, 0.5, batches=batches, loss=loss, progress=False)
    return looks_of(model)


def _masked(device: str) -> Any:
    model, _, _ = made("conv", device)
    keep = {"first.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool, device=device)}
    keep["first.weight"][0] = False
    lightning_prune.apply_masks_(model, keep)
    return looks_of(model)


def _recalibrated(device: str) -> Any:
    model, _, batches = made("conv", device)
    lightning_prune.recalibrate_batch_norm(model, [x for x, _ in batches])
    return looks_of(model)


def _state_dict_loaded(device: str) -> Any:
    """Load the state dict of a pruned model, brought to the CPU, into one on the device."""
    pruned, example, _ = made("conv", device)
    lightning_prune.prune_filters(pruned, example, 0.4, progress=False)
    state = pruned.state_dict()
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            state[name] = tensor.cpu()
    model = made("conv", device)[0]
    lightning_prune.load_state_dict_(model, state)
    return looks_of(model), {parameter.device.type == device for parameter in model.parameters()}


def _slim_loaded(device: str) -> Any:
    pruned, example, _ = made("conv", device)
    lightning_prune.prune_filters(pruned, example, 0.4, progress=False)
    model = made("conv", device)[0]
    with lightning_prune.slim_loading():
        model.load_state_dict(pruned.state_dict())
    return looks_of(model)


def _evaluated(model: nn.Module) -> float:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return float(model(torch.randn(4, 3, 8, 8, generator=generator).to(device)).abs().sum())


def _values(groups: Iterable[Any]) -> list[Any]:
    return [(group.name, list(group.values)) for group in groups]


def _sensitivity(device: str) -> Any:
    model, example, _ = made("conv", device)
    return _values(lightning_prune.sensitivity(model, example, _evaluated, shares=[0.5], progress=False).groups)


def _weight_sensitivity(device: str) -> Any:
    model, _, _ = made("conv", device)
    return _values(weight_sensitivity(model, _evaluated, shares=[0.5], progress=False).groups)


def _latency(device: str) -> Any:
    dense, example, _ = made("conv", device)
    pruned = made("conv", device)[0]
    lightning_prune.prune_filters(pruned, example, 0.5, progress=False)
    report = compare_latency(dense, pruned, example, batch_sizes=[1, 2], progress=False)
    return [timing.batch_size for timing in report.timings]


def _comparison(device: str) -> Any:
    model, example, batches = made("conv", device)
    torch.manual_seed(1)
    found = compare_criteria(model, example, batches=batches, loss=loss, progress=False)
    return {name: [one.per_layer, one.all_layers] for name, one in found.items()}


def _oracle(device: str) -> Any:
    model, example, batches = made("conv", device)
    found = oracle(model, find_structure(trace(model, example)), batches, loss)
    return {name: change.cpu().tolist() for name, change in found.items()}


def _counted(device: str) -> Any:
    model, example, _ = made("conv", device)
    return lightning_prune.count_flops(model, example).total


def _semi_structured(device: str) -> Any:
    """Ask for sparse kernels, which are CUDA's alone."""
    model, _, _ = made("mlp", device)
    lightning_prune.prune_weights(model, pattern="2:4")
    return list(to_semi_structured_(model).faster)


def _pruned_twice(device: str) -> Any:
    model, example, batches = made("conv", device)
    lightning_prune.prune_filters(model, example, 0.4, progress=False)
    lightning_prune.prune_obs(model, 0.5, batches=[x for x, _ in batches], progress=False)
    return looks_of(model)


PUBLIC: dict[str, Entry] = {
    "apply_masks_": _masked,
    "count_flops": _counted,
    "hold_masks": partial(_weights, amount=0.5),
    "load_sparse": partial(_weights, amount=0.7),
    "load_sparse_": partial(_weights, amount=0.9),
    "load_state_dict_": _state_dict_loaded,
    "prune_filters": _pruned_twice,
    "prune_layers": _layers,
    "prune_obs": partial(_obs, "mlp", amount=0.5),
    "prune_weights": _semi_structured,
    "recalibrate_batch_norm": _recalibrated,
    "save_sparse": partial(_weights, amount=0.1),
    "sensitivity": _sensitivity,
    "slim_loading": _slim_loaded,
}
"""The package's functions. Those of Lightning's are in another file, and ``coupling_rule`` touches no tensor."""

ANALYSIS: dict[str, Entry] = {
    "compare_criteria": _comparison,
    "compare_latency": _latency,
    "oracle": _oracle,
    "sensitivity": _sensitivity,
    "weight_sensitivity": _weight_sensitivity,
}

PRUNING: dict[str, Entry] = {
    "prune_exact": partial(_exact, "obs"),
    "prune_experts": _experts,
    "prune_filters": _pruned_twice,
    "prune_fisher": _fisher,
    "prune_layers": _layers,
    "prune_obs": partial(_obs, "mlp", amount=0.5),
    "prune_weights": partial(_weights, amount=0.5),
}
