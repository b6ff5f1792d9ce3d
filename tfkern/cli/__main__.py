import sys

import tfkern_program

sys.exit(tfkern_program.main())
