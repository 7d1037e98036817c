import io

import numpy as np
import pytest
from PIL import Image

from memlm.evaluation.plots import draw_plots
from memlm.evaluation.plots.frontier import costs_by_length, frontier
from memlm.evaluation.plots.style import COLOURS, Places
from tests.evaluation.example_results import (
    LENGTHS,
    MEMORY,
    drawn,
    mqar,
    needle,
    perplexity,
    recall_task,
    results,
    run,
    with_depths,
)

VIRIDIS_TOP = (253, 231, 36)


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def count(image: bytes, colour: tuple[int, int, int]) -> int:
    return int((pixels(image) == colour).all(-1).sum())


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(colour[1:]))


def test_every_task_has_its_pictures():
    _, light, dark = drawn()
    assert list(light) == list(dark)
    assert list(light) == [
        "frontier.png",
        "cost.png",
        "needle_curves.png",
        "needle_depths_1.png",
        "needle_depths_2.png",
        "mqar_curves.png",
        "perplexity_losses.png",
    ]


def test_light_and_dark_pictures():
    _, light, dark = drawn()
    for name, image in light.items():
        assert tuple(pixels(image)[0, 0]) == (255, 255, 255), name
        assert tuple(pixels(dark[name])[0, 0]) == rgb("#16181c"), name
        assert pixels(image).shape == pixels(dark[name]).shape


def test_curves_have_a_colour_per_condition():
    image = drawn()[1]["needle_curves.png"]
    for condition in ("on", "off", "changed", "absent"):
        assert count(image, rgb(COLOURS[condition])) > 200, condition
    assert count(image, rgb(COLOURS["zeroed"])) == 0


def test_heatmaps_have_the_colours_of_the_scores():
    light = drawn()[1]
    assert count(light["needle_depths_1.png"], VIRIDIS_TOP) > 1000
    zeros = count(light["needle_depths_1.png"], (68, 1, 84))
    assert zeros > 10 * count(light["needle_depths_1.png"], VIRIDIS_TOP)


def test_frontier_keeps_what_nothing_beats():
    points = [(4, 50.0), (1, 20.0), (2, 20.0), (2, 60.0), (8, 60.0), (9, 61.0)]
    assert frontier(points) == [(1, 20.0), (2, 60.0), (9, 61.0)]
    assert frontier([(3, 0.0)]) == [(3, 0.0)]


def test_costs_are_summed_over_the_tasks_of_a_length():
    first, second = (recall_task("x", ["1024"], False, ["on"]) for _ in range(2))
    second["cost"]["1024"] |= {"seconds": {"read": 100.0}, "state_bytes": 7 << 20}
    second["cost"]["1024"]["peak_memory_bytes"] = None
    found = costs_by_length(run("m", {"needle": first, "passkey": second, "mqar": mqar(["on"])}))
    assert list(found) == ["1024"]
    seconds = 100.0 + first["cost"]["1024"]["seconds"]["read"]
    assert found["1024"]["seconds_per_token"] == pytest.approx(seconds / (2 * 40 * 1024))
    assert found["1024"]["state_bytes"] == 7 << 20
    assert found["1024"]["peak_memory_bytes"] == first["cost"]["1024"]["peak_memory_bytes"]


def test_places_of_settings():
    lengths = Places(["1024", "4096"])
    assert lengths.logarithmic and lengths.at("4096") == 4096 and lengths.at("1024", 1) == 2048
    for labels in (["1-127", "128-255"], ["0k", "4k"], ["all"]):
        places = Places(labels)
        assert not places.logarithmic
        assert places.at(labels[-1], 0.25) == len(labels) - 0.75
    assert Places(["4k", "1M"]).at("1M") == 1 << 20


def test_groups_have_pictures_of_all_their_tasks():
    tasks = {
        "niah_single_1": with_depths(recall_task("S-NIAH 1", LENGTHS[:2], True, MEMORY[:2])),
        "vt": recall_task("Variable tracking", LENGTHS[:2], True, MEMORY[:2]),
    }
    found = draw_plots(results(run("m", tasks)))
    assert list(found) == [
        "frontier.png",
        "cost.png",
        "ruler_curves.png",
        "ruler_tasks.png",
        "ruler_depths_1.png",
    ]
    assert count(found["ruler_tasks.png"], VIRIDIS_TOP) > 500


def test_what_was_not_measured_is_not_drawn():
    only = perplexity(["on"])
    only["cost"] = {}
    assert list(draw_plots(results(run("m", {"perplexity": only})))) == ["perplexity_losses.png"]
    bare = needle(["1024"], True, ["on"])
    bare |= {"depths": {}, "cost": {}}
    bare["scores"]["1024"]["on"] |= {"low": None, "high": None}
    assert list(draw_plots(results(run("$\\frac{m$", {"needle": bare})))) == ["needle_curves.png"]
