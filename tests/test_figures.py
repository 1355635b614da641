"""Figures that README and pages quote are those of the JSON files that the benchmarks wrote."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def found(name):
    """What a benchmark wrote."""
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def page(name):
    return (ROOT / name).read_text()


def row(*cells):
    """A line of a table of Markdown; an empty cell is a single blank."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def only(rows, **wanted):
    """The one row that has these values."""
    (match,) = [one for one in rows if all(one[key] == value for key, value in wanted.items())]
    return match


def fine_tuned(criterion, scope):
    """The mean accuracy of ResNet-20 over seeds after the short fine-tuning, in percent."""
    runs = found("half_flops-20")["runs"]
    ours = [run for run in runs if (run["library"], run["criterion"], run["scope"]) == ("ours", criterion, scope)]
    return 100 * statistics.mean(run["fine_tuned"] for run in ours if run["groups"] == "all")


def test_errors_planted_and_caught():
    """README says how many planted errors had an effect, how many were caught, and that right cuts are kept."""
    kinds = found("proof")["counts"]
    planted = [modes["all"] for name, modes in kinds.items() if not name.startswith("none")]
    effective, caught = (sum(counts[key] for counts in planted) for key in ("effective", "caught"))
    readme = " ".join(page("README.md").split())
    assert f"Of {effective:,} errors planted in correct cuts {caught:,} are caught" in readme
    assert ("no correct cut is refused" in readme) == (
        "refused without effect" not in kinds["none: the right cut"]["all"]
    )


def test_what_comes_of_half_a_network():
    """README's comparison of three libraries is that of peers.json."""
    libraries = found("peers")
    kept = [f"{libraries[name]['flops_left']:.2f}" for name in libraries]
    trained = [f"{libraries[name]['trained']:.2f}" for name in libraries]
    readme = page("README.md")
    assert row("FLOPs kept", *kept) in readme
    assert (
        row(
            "fraction of parameters that the optimizer still trains",
            *trained[:-1],
            f"{trained[-1]}: it holds the old tensors",
        )
        in readme
    )
    masked, lightning = libraries["IterativeMagnitudePruning"], libraries["ModelPruning"]
    zeros = f"{masked['zeros']:.2f} | {lightning['zeros']:.2f}: its `amount` compounds"
    assert zeros in readme
    resumed = (
        f"{masked['zeros_after_resume']:.2f} | {lightning['zeros_after_resume']:.2f} | the checkpoint does not load |"
    )
    assert resumed in readme


@pytest.mark.parametrize(
    "library, criterion, text",
    [
        ("ours", "obs, repaired", '`criterion="obs"`, consumer layers refitted (`repair=True`)'),
        ("ours", "output_change", '`criterion="output_change"`'),
        ("torch-pruning", "l1", "torch-pruning, L1, residual streams kept whole (its best setting)"),
        ("torch-pruning", "taylor", "torch-pruning, Taylor, residual streams kept whole"),
    ],
)
def test_half_of_the_flops(library, criterion, text):
    """README's rows are those of the long fine-tuning."""
    runs = [
        run for run in found("half_flops-20-ten")["runs"] if (run["library"], run["criterion"]) == (library, criterion)
    ]
    means = [100 * statistics.mean(run[key] for run in runs) for key in ("flops_left", "after_cut", "fine_tuned")]
    seeds = " (one seed)" if len(runs) == 1 else ""
    assert row(text + seeds, *[f"{mean:.1f} %" for mean in means]) in page("README.md")


@pytest.mark.parametrize(
    "way, text",
    [
        ("ours, blocked, not in sequence", '`prune_obs`, `solver="blocked"`'),
        ("ours, admm", "`prune_obs`, `sequential=True`"),
        ("SparseGPT, llm-compressor", "SparseGPT, by llm-compressor"),
        ("Wanda, llm-compressor", "Wanda, by llm-compressor"),
    ],
)
def test_weights_of_a_language_model(way, text):
    """README's perplexities with zeroed weights are those of language.json."""
    rows = found("language")["weights"]
    figures = [f"{only(rows, way=way, share=share)['perplexity']:.2f}" for share in ("60 %", "70 %")]
    readme = page("README.md")
    assert row(text, *figures, "") in readme
    assert f"(held-out perplexity {only(rows, way='dense')['perplexity']:.2f})" in readme


@pytest.mark.parametrize(
    "way, text",
    [
        ("ours, taylor, repaired", '`prune_filters(criterion="taylor", repair=True)`'),
        ("torch-pruning, taylor", "torch-pruning, Taylor"),
    ],
)
def test_widths_of_a_language_model(way, text):
    """README's perplexities with half of the FLOPs removed are those of language.json."""
    found_row = only(found("language")["widths"], keys="a key for every head", part="50 % of the FLOPs", way=way)
    assert row(text, "", "", f"{found_row['perplexity']:.2f}") in page("README.md")


@pytest.mark.parametrize("made", found("li2016")["architecture"], ids=lambda made: made["network"])
def test_networks_of_li(made):
    """README's table of networks has the FLOPs and parameters of li2016.json, as the paper prints them."""
    figures = made["figures"]
    flops, params = figures["flops_left"], figures["params_left"]
    (line,) = [line for line in page("README.md").splitlines() if line.startswith(f"| {made['network']} |")]
    numbers = [cell.split()[0] for cell in line.strip("| ").split(" | ")[1:3]]
    digits = [len(text.partition("e")[0].replace(".", "")) for text in numbers]
    assert [float(text) for text in numbers] == [
        float(f"{one['ours']:.{size - 1}e}") for one, size in zip((flops, params), digits, strict=True)
    ]
    assert line.endswith(f"| {flops['printed']}, {params['printed']} |")
    shares = [float(text) for text in re.findall(r"\(−([\d.]+) %\)", line)]
    cuts = [figures[key]["ours"] for key in ("flops_cut", "params_cut")]
    assert shares == pytest.approx(cuts, abs=0.11)  # as the paper prints them: three are cut off, not rounded


def test_what_scores_cost():
    """README and the page of criteria say what a step costs with scores."""
    ratios = found("overhead")["ratios"]
    weights, activations = (f"{100 * (ratios[form] - 1):.0f} %" for form in ("weights", "activations"))
    assert f'{weights} (`form="weights"`) or {activations} (`"activations"`) slower' in page("README.md")
    criteria = page("docs/how-to/criterion.md")
    assert f"about {weights} of a step" in criteria and f"about {activations} of a step" in criteria


def test_the_table_of_methods():
    """The decision table quotes the benchmarks that it names."""
    choose = page("docs/how-to/choose.md")
    runs = found("half_flops-20-ten")["runs"]
    longest = statistics.mean(run["fine_tuned"] for run in runs if run["criterion"] == "obs, repaired")
    assert (
        f"→ {100 * longest:.1f} % after ten passes over the data, {fine_tuned('obs, repaired', 'global'):.1f} % after"
        in choose
    )
    assert f"the same: {fine_tuned('taylor', 'global'):.1f} % after 79 steps" in choose
    assert f"the same: {fine_tuned('l1', 'layer'):.1f} % after 79 steps" in choose
    lenet = found("han2015")["LeNet-300-100"]["0"]
    assert f"{lenet['dense']['error']} → {lenet['12x']['error']} % error" in choose


def test_weights_zeroed_at_once():
    """The decision table quotes the accuracies of obs-weights-20.json, rounded to a tenth."""
    rows = found("obs-weights-20")["rows"]
    dense = only(rows, name="dense")["accuracy"]
    split = only(rows, name="admm, split", amount=0.7)["accuracy"]
    smallest = only(rows, name="magnitude, one threshold", amount=0.7)["accuracy"]
    (line,) = [line for line in page("docs/how-to/choose.md").splitlines() if "`OBSOneShot" in line]
    figures = [float(text) for text in re.findall(r"[\d.]+(?= →| %[ )])", line.partition("zeroed: ")[2])]
    assert figures == pytest.approx([100 * dense, 100 * split, 100 * smallest], abs=0.051)


def test_removed_experts():
    """The table of removed experts is that of experts.json."""
    rows, text = found("experts")["rows"], page("docs/how-to/experts.md")
    for removed in (0.25, 0.5):
        reap, frequency = (only(rows, way=way, removed=removed) for way in ("reap", "frequency"))
        chance = [one["perplexity"] for one in rows if (one["way"], one["removed"]) == ("random", removed)]
        by_chance = f"{statistics.mean(chance):.2f} ({min(chance):.2f} to {max(chance):.2f})"
        figures = [f"{reap['params']:,}", f"{reap['perplexity']:.2f}", f"{frequency['perplexity']:.2f}", by_chance]
        assert row(f"{removed:.0%} of the experts".replace("%", " %"), *figures) in text


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_removed_blocks(count):
    """The table of removed blocks is that of depth.json."""
    rows = found("depth")["rows"]
    plain, repaired = rows[f"{count} layers"], rows[f"{count} layers, repaired"]
    shares = [plain["flops_removed"], plain["accuracy"], repaired["accuracy"]]
    times = f"{repaired['milliseconds_1']:.1f}", f"{repaired['milliseconds_64']:.0f}"
    cells = [f"{100 * share:.1f} %" for share in shares]
    assert row(f"{count} blocks", *cells, *times) in page("docs/how-to/layers.md")
