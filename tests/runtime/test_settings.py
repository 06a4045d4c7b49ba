import pytest

from moescale.errors import ConfigError
from moescale.runtime.settings import TrainSettings, learning_rate_at, warmup_problem


def rates(total: int, **fields) -> list[float]:
    settings = TrainSettings(learning_rate=1.0, **fields)
    return [learning_rate_at(settings, step, total) for step in range(total)]


def test_warm_up_rises_linearly_to_the_peak_at_its_last_step():
    assert rates(6, warmup_steps=3, schedule="constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_linear_and_cosine_end_at_the_final_ratio():
    assert rates(5, schedule="linear", final_learning_rate_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert rates(3, schedule="cosine", final_learning_rate_ratio=0.0) == pytest.approx([1, 0.5, 0.0])


def test_a_run_of_one_step_and_a_warm_up_longer_than_the_run_are_fine():
    assert rates(1) == [1.0]
    assert rates(2, warmup_steps=5) == pytest.approx([1 / 6, 2 / 6])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("steps", 0),
            ("learning_rate", 0.0),
            ("learning_rate", float("nan")),
            ("beta2", 1.0),
            ("keep_checkpoints", 0),
        ),
        *((name, float("inf")) for name in ("learning_rate", "eps", "weight_decay", "gradient_clip")),
        *(
            ("schedule", "wsd"),
            ("checkpoint_minutes", float("inf")),
            ("max_skipped_steps", 0),
            ("seed", 2**63),
            ("seed", -(2**63) - 1),
        ),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"run\.{field} \({value}\) must"):
        TrainSettings(**{field: value})


@pytest.mark.parametrize(
    ("warmup_steps", "total", "schedule", "said"),
    [
        (10, 4, "cosine", "never reached"),
        (4, 4, "constant", "never reached"),
        (3, 4, "linear", "never falls"),
        (3, 4, "constant", None),
        (2, 4, "cosine", None),
        (0, 1, "cosine", None),
    ],
)
def test_a_warm_up_that_takes_all_steps_is_said(warmup_steps, total, schedule, said):
    problem = warmup_problem(TrainSettings(warmup_steps=warmup_steps, schedule=schedule), total)
    assert (problem is None) if said is None else (said in problem)
