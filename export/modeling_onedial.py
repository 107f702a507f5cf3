"""The classes through which Hugging Face's transformers uses onedial's GPT. An export contains this file."""

from functools import partial

import torch
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import GPT, CachedAttention, GPTConfig, look_back, rotary_tables

PADDING = -1  # in a TokenLayer
# "cache" since transformers 5.24, "past_key_values" before
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
UNSUPPORTED = ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states")


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


class TokenLayer(DynamicLayer):
    """
    The first layer of a cache: the ids of its tokens, (B, 1, T, 1). Smear needs the previous token, and a row
    that gets too long is read again. The cache's length counts also the tokens that were cut off.
    """

    cut = 0

    def get_seq_length(self):
        return self.cut + super().get_seq_length()

    def reset(self):
        super().reset()
        self.cut = 0


class StoredAttention(CachedAttention):
    """Attention with its keys and values in a cache of transformers. The keys of padding are 0."""

    def __init__(self, config, update, there, mask):
        self.n_look_back, self.update, self.there, self.mask = config.n_look_back, update, there, mask

    def store(self, k, v):
        k, v = self.update((k * self.there[..., None, None]).transpose(1, 2), v.transpose(1, 2))
        return look_back(k.transpose(1, 2), self.n_look_back), v.transpose(1, 2)


class OnedialForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OnedialConfig
    _no_split_modules = ["GPT"]  # with device_map="auto" on one device

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

    def forward(self, input_ids, attention_mask=None, labels=None, cache=None, logits_to_keep=0, **others):
        """
        fp32 logits (B, T, vocab_size), or of the last `logits_to_keep` tokens; with labels also the loss of
        the next tokens in nats: the mean, or the sum / num_items_in_batch. attention_mask: 0 for padding and
        1 for tokens, also those in the cache. Raises ValueError, two lines, for what the model cannot do.
        """
        cache = others.get("past_key_values") if cache is None else cache
        for name in UNSUPPORTED:
            if others.get(name) is not None and others[name] is not False:
                raise ValueError(f"{name} is not supported.\nUse input_ids and attention_mask.")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"{type(cache).__name__} is not supported.\nUse a DynamicCache, the default.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.dim() != 2:
            raise ValueError(f"the mask has {mask.dim()} dimensions.\nGive 1 or 0 for each token.")
        there = mask[:, -input_ids.size(1) :].bool()
        cache = DynamicCache() if cache is None and others.get("use_cache") else cache
        self.gpt.compute_dtype = self.dtype
        if cache is not None or (there[:, 1:] > there[:, :-1]).any():  # padding on the left
            rows = input_ids.masked_fill(~there, PADDING)
            x = self.read(rows, DynamicCache() if cache is None else cache, logits_to_keep)
            logits = self.gpt.head(x)
        elif input_ids.size(1) <= self.config.max_seq_len:
            logits = self.gpt(input_ids)[:, -logits_to_keep:]
        else:
            n, T = input_ids.size(1), self.config.max_seq_len
            raise ValueError(f"{n} tokens are more than the model reads.\nGive it {T} at most.")
        options = {
            "vocab_size": self.config.vocab_size,
            "num_items_in_batch": others.get("num_items_in_batch"),
        }
        loss = None if labels is None else self.loss_function(logits, labels, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def read(self, rows, cache, keep):
        """
        Read new tokens or PADDING, (B, T), into the cache -> input of the head for the last `keep` of them,
        (B, keep, C); 0 means all. For a single result, rows may be laid out again.
        """
        if not (cache.layers and isinstance(cache.layers[0], TokenLayer)):
            if cache.get_seq_length():
                raise ValueError("another model has filled this cache.\nUse a new DynamicCache.")
            cache.layers.insert(0, TokenLayer())
        tokens, new, keep = cache.layers[0], rows.size(1), keep or rows.size(1)
        rows = rows if tokens.keys is None else torch.cat([tokens.keys[:, 0, :, 0], rows], dim=1)  # (B, S)
        there, T = rows >= 0, self.config.max_seq_len
        if there.sum(1).max() > T or (there[:, 1:] < there[:, :-1]).any():
            if keep > 1:
                what = f"a row has more than {T} tokens, or padding after a token"
                raise ValueError(f"{what}.\nShorten it and pad on the left, or set logits_to_keep to 1.")
            tokens.cut, rows = tokens.cut + rows.size(1), self.lay_out(rows)
            for layer in cache.layers:
                if layer.keys is not None:
                    layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
            new, there = rows.size(1), rows >= 0
            tokens.cut -= new
        tokens.update(*2 * [rows[:, None, -new:, None]])
        ids, slots = rows.clamp(min=0), torch.arange(rows.size(1), device=rows.device)
        positions, mask = (there.cumsum(1) - 1).clamp(min=0)[:, -new:], None
        x = self.gpt.embed(ids[:, -new - 1 :])[:, -new:]  # smear: one token back
        if not there.all() or 1 < new < rows.size(1):
            alone = self.gpt.embed(ids[:, -new:].reshape(-1, 1)).view_as(x)
            x = torch.where((positions == 0)[..., None], alone, x)
            own = slots[-new:, None]
            mask = (slots <= own) & there[:, None, None] | (slots == own)  # (B, 1, T, S)
        updates = [partial(cache.update, layer_idx=i + 1) for i in range(self.config.n_layer)]
        attentions = [StoredAttention(self.config, update, there[:, -new:], mask) for update in updates]
        return self.gpt.read(x, ids[:, -new:], positions, attentions)[:, -keep:]

    def lay_out(self, rows):
        """Put the padding of each row first, and cut a row that is too long as GPT.generate does."""
        rows, T = rows.gather(1, (rows >= 0).int().argsort(dim=1, stable=True)), self.config.max_seq_len
        length, place = (
            (rows >= 0).sum(1, keepdim=True),
            torch.arange(rows.size(1), 0, -1, device=rows.device),
        )
        kept = torch.where(length > T, T // 2, length)
        rows = rows.masked_fill(place > kept, PADDING)
        rows = rows.masked_fill((length > T) & (place == kept + 1), self.config.bos_token_id)
        return rows[:, -int((rows >= 0).sum(1).max()) :]
