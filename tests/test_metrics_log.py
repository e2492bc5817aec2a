"""The log of a run."""

from tosa_convert.runs.metrics_log import append_metrics, read_metrics


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path):
    append_metrics(tmp_path, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    append_metrics(tmp_path, step=3)
    append_metrics(tmp_path, step=4)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}, {"step": 4}]
