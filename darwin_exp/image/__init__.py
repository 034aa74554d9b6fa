"""The training image: what candidates find in their containers.

- `recipe.py` says what an image is made from; its tag is the hash of that.
- `store.py` speaks with the container engine about images, and alone here knows docker-py.
- `debian.py` makes a base where no image registry can be reached.
- `making.py` makes images, for `python -m darwin_exp.image`; `finding.py` finds the one to run.
- `library.py` adds a library that people approved; `wheels.py` fetches it, and knows pip.
"""

from darwin_exp.image.finding import check_cuda as check_cuda
from darwin_exp.image.finding import resolve_image as resolve_image
from darwin_exp.image.library import LibraryImage as LibraryImage
from darwin_exp.image.library import image_is_here as image_is_here
from darwin_exp.image.library import with_libraries as with_libraries
from darwin_exp.image.library import with_library as with_library
from darwin_exp.image.making import base_image as base_image
from darwin_exp.image.making import training_image as training_image
from darwin_exp.image.recipe import ImageError as ImageError
from darwin_exp.image.recipe import ImageMissing as ImageMissing
from darwin_exp.image.wheels import LibraryRefused as LibraryRefused
from darwin_exp.image.wheels import Requirement as Requirement
from darwin_exp.image.wheels import parse_requirement as parse_requirement
