"""The classes through which Hugging Face's transformers uses onedial's GPT. An export contains this file."""

from torch.nn.functional import pad
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT, GPTConfig, rotary_tables


class OnedialConfig(PretrainedConfig):
    model_type = "onedial"
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(self, gpt=None, **options):
        self.gpt = gpt or vars(GPTConfig())  # the fields of GPTConfig
        for name, value in self.gpt.items():
            setattr(self, name, value)
        super().__init__(**options)


class OnedialForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OnedialConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    def _init_weights(self, module):
        """Compute the rotary tables: they are buffers that the saved weights do not contain."""
        if isinstance(module, GPT):
            shape = module.config.max_seq_len, module.config.head_dim
            module.cos, module.sin = rotary_tables(*shape, module.head.weight.device)

    def get_input_embeddings(self):
        return self.gpt.embedding

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """fp32 logits (B, T, vocab_size); with labels also the mean loss of the next tokens, in nats."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("padding is not supported.\nUse texts of the same length, or one text.")
        if input_ids.size(1) > self.config.max_seq_len:
            raise ValueError(f"more than {self.config.max_seq_len} tokens.\nShorten the input.")
        self.gpt.compute_dtype = self.dtype
        logits = self.gpt(input_ids)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):  # with this name a mask is accepted
        """Cut a row that is too long as GPT.generate does: to bos and its last ids, half a row or more."""
        T, n = self.config.max_seq_len, input_ids.size(1)
        if n > T:
            kept = T // 2 + (n - T - 1) % (T - T // 2)  # since the last cut
            input_ids = pad(input_ids[:, -kept:], (1, 0), value=self.config.bos_token_id)
        return {"input_ids": input_ids}
