"Package metadata: everything comes from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
library = cfg["lib_name"]
readme = here / "README.md"
extras = {
    field.removesuffix("_requirements"): value.split()
    for field, value in cfg.items()
    if field.endswith("_requirements")
}

setup(
    name=library,
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    python_requires=">=" + cfg["min_python"],
    # In a wheel the experiments and tours lie in dr2seg_lib/notebooks; in a checkout, in nbs.
    packages=[*find_packages(include=[library, f"{library}.*"]), f"{library}.notebooks"],
    package_dir={f"{library}.notebooks": "nbs"},
    package_data={
        library: ["weights/**", "presets/*.toml", "viewing/templates/**", "**/static/*"],
        f"{library}.notebooks": ["experiments/*.ipynb", "tours/*.ipynb"],
    },
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": [cfg["console_scripts"]]},
    zip_safe=False,
)
