"读取 settings.ini 的元数据；版本号来自 vembed_nb/__init__.py。"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
meta = cfg["DEFAULT"]
version = re.search(r'__version__ = "([^"]+)"', (here / "vembed_nb/__init__.py").read_text(encoding="utf-8"))[1]
extras = {k.removeprefix("extra_"): v.split() for k, v in meta.items() if k.startswith("extra_")}
extras["dev"] = meta["dev_requirements"].split()
status = {"3": "Development Status :: 3 - Alpha", "4": "Development Status :: 4 - Beta"}[meta["status"]]

setup(
    version=version,
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license=meta["license"],
    author=meta["author"],
    keywords=meta["keywords"].split(),
    classifiers=[status, "Intended Audience :: Developers", "Natural Language :: Chinese (Simplified)",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    python_requires=f">={meta['min_python']}",
    install_requires=meta["requirements"].split(),
    extras_require=extras,
    packages=find_packages(include=["vembed_nb", "vembed_nb.*"]),
    package_data={"vembed_nb": ["_data/**/*"]},
    include_package_data=False,
    entry_points={"console_scripts": [meta["console_scripts"]], "nbdev": ["vembed_nb=vembed_nb._modidx:d"]},
)
