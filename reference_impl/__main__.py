"""How is the trainer run as a module?  python -m reference_impl CONFIG.yaml key=value ..."""

import sys

from reference_impl.cli import main

if __name__ == "__main__":
    sys.exit(main())
