"""tokvm lab: a hypervisor to try it on, with a real guest, on this machine."""

import typer

lab = typer.Typer(help="Try tokvm on an embedded hypervisor with a real guest.", no_args_is_help=True)
