"""Upload a checkpoint to the Hugging Face Hub, with a card that says what it is, what it was measured to do, and how.

Paths of this machine stay here, and so do files that are no part of a checkpoint. Nothing in the directory changes.

Example: longext push out/llama2-32k me/llama2-32k --results results/llama2-32k --dry-run
"""

from __future__ import annotations

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.errors import LongextError
from longext.report.commands.push import PushConfig


def run(config: PushConfig, as_json: bool, dry_run: bool) -> None:
    """Make the card, then show what would be uploaded, or upload it."""
    from longext.cli.output import show
    from longext.manifest import result_record
    from longext.report.commands.push import parcel_table, prepare, push
    from longext.report.console import say, working

    made = prepare(config)
    parcel = made.parcel
    address = None
    if not dry_run:
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            with working(f"uploading to {config.repo}"):
                address = push(made, config)
        except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, ValueError) as error:
            told = " ".join(str(error).split())[:200]
            raise LongextError(f"Nothing was uploaded to {config.repo}: {told} (`hf auth login` signs in)") from error
    files = {name: parcel.size(name) for name in parcel.files}
    card = parcel.texts["README.md"]
    record = result_record(
        "push", model=config.model, repo=config.repo, url=address, files=files, left_out=parcel.left_out, card=card
    )
    notes = [*made.notes, f"Uploaded: {address}" if address else "Dry run: nothing was uploaded."]
    if parcel.left_out:
        notes.insert(0, f"Left out: {', '.join(parcel.left_out)}.")
    if dry_run and not as_json:
        say(f"{card}\n")
    show(record, [parcel_table(made, config.repo)], as_json=as_json, notes=notes)


SWITCHES = {"dry_run": "List the files and show the card; upload nothing."}
COMMANDS.register("push", Command(config=PushConfig, run=run, switches=SWITCHES, has_recipe=False))
