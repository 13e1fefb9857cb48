"""The tables of docs/recipes.md, from the recipes themselves.

python docs/site/recipes.py        writes them anew
"""

from pathlib import Path

from lori_trl.recipes.find import is_merge_recipe, list_recipes, read_recipe, recipe_facts

PAGE = Path(__file__).parents[1] / "recipes.md"


def recipes_page() -> str:
    """Return docs/recipes.md: what is typed by hand there, up to the first table, and the tables of all recipes."""
    rows: dict[str, list[str]] = {"Adapters": [], "Baselines": [], "Merges": []}
    for file in list_recipes():
        if is_merge_recipe(file):
            recipe = read_recipe(file)
            cells = [", ".join(recipe["adapters"]), recipe["weights"], recipe["method"], recipe.get("density", "")]
            rows["Merges"].append(f"| `{file.name}` | {' | '.join(map(str, cells))} |")
        else:
            *cells, _ = recipe_facts(file).values()
            kind = "Baselines" if file.parent.name == "baselines" else "Adapters"
            rows[kind].append(f"| `{file.name}` | {' | '.join(cells)} |")
    facts = "| recipe | task | base | variant | rank | source |\n| --- | --- | --- | --- | --- | --- |"
    merges = "| recipe | adapters | weights | method | density |\n| --- | --- | --- | --- | --- |"
    intro = PAGE.read_text(encoding="utf-8").partition("\n## Adapters\n")[0]
    tables = [f"## {kind}\n\n{merges if kind == 'Merges' else facts}\n" + "\n".join(rows[kind]) for kind in rows]
    return "\n\n".join([intro.rstrip(), *tables]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(recipes_page(), encoding="utf-8")
