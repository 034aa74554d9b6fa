"""Language models: asked over the wire, each question once, within caps, recorded and replayed.

`Exchanges` implements `protocols.LanguageModels`; the other modules are what it is made of.
"""

from darwin_exp.llm.exchanges import Exchanges as Exchanges
from darwin_exp.llm.patience import Patience as Patience
from darwin_exp.llm.recording import Recording as Recording
from darwin_exp.llm.recording import ReplayExecutor as ReplayExecutor
from darwin_exp.llm.recording import write_recording as write_recording
