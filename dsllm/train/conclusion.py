"""Ends an attempt: writes its status, draws its picture, prints its last line, returns its exit code."""

from dsllm.errors import EXIT_INTERRUPTED
from dsllm.session.open import Session
from dsllm.session.progress import Progress
from dsllm.train.picture import draw_loss_curve


def conclude(session: Session, progress: Progress, stopped_by: str) -> int:
    """Write the status, then draw the loss curve; the process's exit code.

    Args:
        stopped_by: the signal that ended the attempt; empty: none did
    """
    directory = session.directory
    finished = progress.step >= session.config.num_steps
    # the status comes first: a picture that cannot be drawn changes neither the status nor the exit code
    directory.write_status("finished" if finished else "interrupted", step=progress.step, tokens=progress.tokens)
    if session.world.rank == 0:
        try:
            draw_loss_curve(directory.path)
        except Exception as error:  # noqa: BLE001 - whatever a plotting library raises, the run is over and saved
            session.report(f"the loss curve was not drawn: {type(error).__name__}: {error}")
    if finished:
        session.report(
            f"trained {progress.tokens:,} tokens; metrics, loss curve (loss.png) and checkpoints are in {directory.path}"
        )
        return 0
    session.report(f"{stopped_by}: saved at step {progress.step}; the same command continues from there")
    return EXIT_INTERRUPTED
