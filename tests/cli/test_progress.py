"""Progress that a log shows: a line now and then, also where nobody watches."""

from megatron_mosaic.cli.output import Progress


def test_a_line_every_few_seconds_without_a_terminal(capsys):
    quick, slow = Progress(every_s=0.0), Progress(every_s=1e9)
    for progress in (quick, slow):
        progress("found")
        progress.beat("still at it")
    assert capsys.readouterr().err.splitlines() == ["mosaic: progress: found", "mosaic: progress: still at it"]
