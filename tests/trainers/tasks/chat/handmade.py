"""Templates in our own words that write what those of Mistral and SmolLM3 write, for which no training variant is
published, with generation marks around what the assistant says. Without the marks they are the template."""

import re

MARK = re.compile(r"{% (end)?generation %}")

MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set talk = messages[1:] if system else messages -%}
{%- set spoken = namespace(count=0, last=0) -%}
{%- for m in talk if m.role != 'tool' and not m.tool_calls -%}
{%- if (m.role == 'user') != (spoken.count % 2 == 0) -%}
{{- raise_exception('user and assistant must take turns') -}}
{%- endif -%}
{%- set spoken.count = spoken.count + 1 -%}
{%- endfor -%}
{%- for m in talk if m.role == 'user' -%}{%- set spoken.last = spoken.last + 1 -%}{%- endfor -%}
{{- bos_token -}}
{%- set asked = namespace(count=0) -%}
{%- for m in talk -%}
{%- if m.role == 'user' -%}
{%- set asked.count = asked.count + 1 -%}
{%- if tools and asked.count == spoken.last -%}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST]' + (system + '\\n\\n' if loop.first and system else '') + m.content + '[/INST]' -}}
{%- elif m.tool_calls -%}
{% generation %}{{- '[TOOL_CALLS][' -}}
{%- for call in m.tool_calls -%}{{- (', ' if not loop.first else '') + call.function | tojson -}}{%- endfor -%}
{{- ']' + eos_token -}}{% endgeneration %}
{%- elif m.role == 'assistant' -%}
{% generation %}{{- m.content + eos_token -}}{% endgeneration %}
{%- else -%}
{{- '[TOOL_RESULTS]' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' -}}
{%- endif -%}
{%- endfor -%}"""

SMOLLM3 = """
{%- set mode = namespace(think=true, system='') -%}
{%- if messages[0].role == 'system' -%}
{%- set mode.think = '/no_think' not in messages[0].content -%}
{%- set mode.system = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{{- '<|im_start|>system\\n## Mode\\n' + ('/think' if mode.think else '/no_think') + '\\n\\n' + mode.system -}}
{%- if xml_tools -%}{{- '\\n\\n## Tools\\n' + xml_tools | tojson -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{% generation %}
{{- ('' if mode.think else '<think>\\n\\n</think>\\n') + m.content.lstrip('\\n') + '<|im_end|>' -}}
{% endgeneration %}{{- '\\n' -}}
{%- elif m.role != 'system' -%}
{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('' if mode.think else '<think>\\n\\n</think>\\n') -}}
{%- endif -%}"""


def pairs() -> dict[str, tuple[str, str]]:
    """Name: (template, the same with marks)."""
    marked = {"mistral, in our words": MISTRAL, "smollm3, in our words": SMOLLM3}
    return {name: (MARK.sub("", text), text) for name, text in marked.items()}
