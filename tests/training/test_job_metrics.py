import pytest

from nat_plugin_evsys.training.step_metrics import StepMetrics, summarize


def test_each_metric_is_reduced_as_its_name_says() -> None:
    history = [
        StepMetrics(10, 2, 1.0, {"loss:sum": 1.0, "r:mean": 1.0, "r:max": 5.0, "r:min": 0.5, "grad_norm": 2.0}),
        StepMetrics(30, 6, 3.0, {"loss:sum": -3.0, "r:mean": 2.0, "r:max": 4.0, "r:min": 0.1, "grad_norm": 4.0}),
    ]
    summary = summarize(history)
    assert summary == pytest.approx(
        {
            "loss:sum": -2.0,
            "r:mean": (1.0 * 2 + 2.0 * 6) / 8,
            "r:max": 5.0,
            "r:min": 0.1,
            "grad_norm": 3.0,
            "steps": 2,
            "tokens": 40,
            "sampled_tokens": 8,
            "seconds": 4.0,
            "tokens_per_second": 10.0,
            "loss_per_token": -0.25,
        }
    )


def test_a_loss_that_was_normalized_is_not_divided_again() -> None:
    assert "loss_per_token" not in summarize([StepMetrics(1, 4, 0.0, {"loss:sum": -0.5}, normalized=True)])


def test_a_metric_of_some_steps_only_is_reduced_over_those() -> None:
    summary = summarize([StepMetrics(1, 1, 0.0, {}), StepMetrics(1, 3, 0.0, {"x:mean": 7.0})])
    assert summary["x:mean"] == 7.0
    assert summary["tokens_per_second"] == 0.0
    assert summarize([])["steps"] == 0
