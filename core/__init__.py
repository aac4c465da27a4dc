"""fitkit: large models on small devices. The public face; everything else lives in the modules it names."""

from core.compress import compress as compress
from core.evaluation.evaluate import evaluate as evaluate
from core.evaluation.measure import measure as measure
from core.export import Artifact as Artifact
from core.export import export as export
from core.export.diffusers_quantizer import enable as _enable
from core.figures import Figure as Figure
from core.figures import Figures as Figures
from core.figures import Gate as Gate
from core.hardware import estimate as estimate
from core.hardware import target as target
from core.kit import InputError as InputError
from core.kit import Recipe as Recipe
from core.kit import load as load
from core.report import Report as Report
from core.report import judge as judge

_enable()  # from_pretrained of diffusers and transformers then loads packed folders
