"Run the command: `python -m dora_nb` is `dora-nb`."

import sys

from dora_nb.command.main import main

sys.exit(main())
