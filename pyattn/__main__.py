import sys

from pyattn.cli import main

sys.exit(main())
