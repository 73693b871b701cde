from . import run_folder
