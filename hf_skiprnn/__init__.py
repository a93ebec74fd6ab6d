"""Skip RNN for Hugging Face transformers: a sequence model that decides which steps to read."""

import sys

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top level may ask for torchvision
from transformers.utils.import_utils import is_vision_available

from hf_skiprnn._moved_modules import MovedModules
from hf_skiprnn.collator import SkipRNNDataCollator
from hf_skiprnn.model.configuration_skip_rnn import SkipRNNConfig
from hf_skiprnn.model.feature_extraction_skip_rnn import SkipRNNFeatureExtractor
from hf_skiprnn.model.image_processing_skip_rnn import SkipRNNImageProcessor
from hf_skiprnn.model.modeling_skip_rnn import (
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    SkipRNNModel,
    SkipRNNPreTrainedModel,
)
from hf_skiprnn.model.outputs_skip_rnn import SkipRNNState
from hf_skiprnn.model.pipeline_skip_rnn import (
    SkipRNNAudioClassificationPipeline,
    SkipRNNImageClassificationPipeline,
    SkipRNNSequenceClassificationPipeline,
    SkipRNNTextClassificationPipeline,
    register_pipelines,
)
from hf_skiprnn.recurrent import SkipGRU, SkipLSTM

__version__ = "0.2.0"

__all__ = [
    "SkipGRU",
    "SkipLSTM",
    "SkipRNNAudioClassificationPipeline",
    "SkipRNNConfig",
    "SkipRNNDataCollator",
    "SkipRNNFeatureExtractor",
    "SkipRNNForFrameClassification",
    "SkipRNNForSequenceClassification",
    "SkipRNNImageClassificationPipeline",
    "SkipRNNImageProcessor",
    "SkipRNNModel",
    "SkipRNNPreTrainedModel",
    "SkipRNNSequenceClassificationPipeline",
    "SkipRNNState",
    "SkipRNNTextClassificationPipeline",
]

sys.meta_path.append(MovedModules())  # last: it is asked for names that nobody else finds

AutoConfig.register("skip_rnn", SkipRNNConfig, exist_ok=True)
AutoModel.register(SkipRNNConfig, SkipRNNModel, exist_ok=True)
for _auto in (AutoModelForSequenceClassification, AutoModelForImageClassification, AutoModelForAudioClassification):
    _auto.register(SkipRNNConfig, SkipRNNForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(SkipRNNConfig, SkipRNNForFrameClassification, exist_ok=True)

AutoFeatureExtractor.register(SkipRNNConfig, SkipRNNFeatureExtractor, exist_ok=True)
SkipRNNFeatureExtractor.register_for_auto_class()

if is_vision_available():  # AutoImageProcessor needs Pillow
    _backends: dict[str, type] = dict.fromkeys(("pil", "torchvision"), SkipRNNImageProcessor)
    AutoImageProcessor.register(SkipRNNConfig, image_processor_classes=_backends, exist_ok=True)
    SkipRNNImageProcessor.register_for_auto_class()

register_pipelines()

# save_pretrained copies the model's code into every checkpoint, also for models that were loaded from a checkpoint.
SkipRNNConfig.register_for_auto_class()
SkipRNNModel.register_for_auto_class("AutoModel")
SkipRNNForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
SkipRNNForFrameClassification.register_for_auto_class("AutoModelForTokenClassification")
