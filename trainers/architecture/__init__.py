"""What makes model families differ, asked of a model and not of its name, and what is done about it.

transformers' models agree on what a text is and on little else: sizes may stand in a nested configuration, a head may
read a row's last place, layers may be dropped at random. Whoever needs to know asks here, one function a property; the
names that configurations and modules give such things stand in no other folder. There are three to ask: a
configuration (`config.py`), a model in memory (`model.py`), and a folder of which nothing is loaded yet (`folder.py`),
which are more than one file holds. `record.py` puts what a configuration tells into one record.
`published.py` writes weights under the names they are published with, `ggml.py` tells a model in llama.cpp's terms.
"""

from trainers.architecture.adjust import cut_layers as cut_layers
from trainers.architecture.adjust import make_ready as make_ready
from trainers.architecture.adjust import set_dropout as set_dropout
from trainers.architecture.adjust import set_pad as set_pad
from trainers.architecture.adjust import shrink as shrink
from trainers.architecture.config import attention_values as attention_values
from trainers.architecture.config import distinct_layers as distinct_layers
from trainers.architecture.config import experts as experts
from trainers.architecture.config import num_layers as num_layers
from trainers.architecture.config import positions as positions
from trainers.architecture.config import router_loss_weight as router_loss_weight
from trainers.architecture.config import token_types as token_types
from trainers.architecture.config import vocabulary as vocabulary
from trainers.architecture.config import width as width
from trainers.architecture.folder import learned_positions as learned_positions
from trainers.architecture.folder import rotary as rotary
from trainers.architecture.folder import token_rows as token_rows
from trainers.architecture.ggml import GgmlModel as GgmlModel
from trainers.architecture.ggml import ggml_model as ggml_model
from trainers.architecture.ggml import ggml_obstacle as ggml_obstacle
from trainers.architecture.model import DOCUMENTS as DOCUMENTS
from trainers.architecture.model import LAYER as LAYER
from trainers.architecture.model import SHARED as SHARED
from trainers.architecture.model import STACK as STACK
from trainers.architecture.model import adaptable_layers as adaptable_layers
from trainers.architecture.model import attention_of as attention_of
from trainers.architecture.model import dropping_stacks as dropping_stacks
from trainers.architecture.model import feed_forward_layers as feed_forward_layers
from trainers.architecture.model import linear_layers as linear_layers
from trainers.architecture.model import makes_weights as makes_weights
from trainers.architecture.model import may_cache as may_cache
from trainers.architecture.model import other_modalities as other_modalities
from trainers.architecture.model import packs_as_one_row as packs_as_one_row
from trainers.architecture.model import plain_model as plain_model
from trainers.architecture.model import stateful_layers as stateful_layers
from trainers.architecture.model import table_positions as table_positions
from trainers.architecture.model import transposed_weights as transposed_weights
from trainers.architecture.model import unread_by_states as unread_by_states
from trainers.architecture.published import INDEX as INDEX
from trainers.architecture.published import PART as PART
from trainers.architecture.published import Weight as Weight
from trainers.architecture.published import in_parts as in_parts
from trainers.architecture.published import published_weights as published_weights
from trainers.architecture.published import whole as whole
from trainers.architecture.published import write_weights as write_weights
from trainers.architecture.record import describe as describe
