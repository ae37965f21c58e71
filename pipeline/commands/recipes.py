"""The commands about recipes: list, show and check them, and the schema that editors take."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import arguments
from pipeline.errors import QwenOnnxError, UsageError

if TYPE_CHECKING:
    from pipeline.facts.recipe import Loaded


def add(root: Any) -> None:
    """Add the commands to the command line."""
    recipe = root.add_parser("recipe", help="list, show, check recipes").add_subparsers(required=True, metavar="ACTION")
    parser = arguments.command(recipe, "list", list_all, "all recipes below a folder")
    parser.add_argument("folder", type=Path, nargs="?", default=arguments.RECIPES)
    parser = arguments.command(recipe, "show", show, "a recipe with all that it extends resolved")
    parser.add_argument("recipe", type=Path)
    parser = arguments.command(recipe, "lint", lint, "check recipes, options of Olive passes included")
    parser.add_argument("recipes", type=Path, nargs="+")
    arguments.command(recipe, "schema", schema, "JSON schema of a recipe, for editors")


def list_all(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.facts import recipe

    paths = recipe.find(options.folder)
    if not paths:
        raise UsageError(f"there are no recipes below {options.folder}")
    loaded = [recipe.load(path) for path in paths]
    rows = [(str(item.path), item.recipe.target, item.recipe.description) for item in loaded]
    print(report.table(rows, ("RECIPE", "TARGET", "DESCRIPTION")))
    return 0


def show(options: argparse.Namespace) -> int:
    import yaml

    from pipeline.facts import recipe

    loaded = recipe.load(options.recipe)
    value = loaded.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    print(f"# {loaded.name}")
    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120), end="")
    return 0


def lint(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.facts import recipe

    worst = 0
    for path in options.recipes:
        try:
            _check_olive_options(recipe.load(path))
        except QwenOnnxError as error:
            report.show_error(error, False)
            worst = max(worst, error.exit_code)
        else:
            print(f"{path}: good")
    return worst


def _check_olive_options(loaded: Loaded) -> None:
    from pipeline import olive
    from pipeline.builds import plan
    from pipeline.facts import recipe

    wanted = loaded.recipe
    written = recipe.exporter_of(wanted, plan.shape_of(loaded))
    olive.check_options(written, wanted.export.options, f"{loaded.path}: export.options")
    if wanted.quantize.options:
        olive.check_options(wanted.quantize.algorithm, wanted.quantize.options, f"{loaded.path}: quantize.options")


def schema(options: argparse.Namespace) -> int:  # noqa: ARG001
    from pipeline.facts import recipe

    print(json.dumps(recipe.json_schema(), indent=1))
    return 0
