"""The options of heads that make maps, and of images with maps."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tosa_convert.base import discovery
from tosa_convert.cli.groups import group

HeadName = StrEnum("HeadName", discovery.names("models/heads"))


class _Head:
    task: Annotated[
        str | None,
        typer.Option(
            help="what a new head makes of the tokens: depth, segmentation, or a task of your own",
            show_default="the model's own head",
        ),
    ]
    head: Annotated[HeadName | None, typer.Option(help="with --task: which head", show_default="light")]
    head_checkpoint: Annotated[
        Path | None, typer.Option(help="with --task: the head's weights", show_default="untrained")
    ]
    max_depth: Annotated[
        float | None, typer.Option(help="with --task depth: metres it reaches at most", show_default="10")
    ]


class _Maps:
    list_file: Annotated[
        Path | None,
        typer.Option("--list", help="images of nyu:ROOT or kitti:ROOT, a line each", show_default=False),
    ]
    depth_scale: Annotated[
        float | None, typer.Option(help="a metre in the PNG files of depth:ROOT", show_default="1000")
    ]


takes_head = group("new_head", _Head)
takes_maps = group("map_options", _Maps)


def source_with(data: str | None, given: dict) -> str | None:
    """A source of images with what was given beside it."""
    from tosa_convert.data.reader import with_options

    return with_options(data, list=given.get("list_file"), scale=given.get("depth_scale"))
