"""Chat templates of the kinds that public families use, written for these tests."""

# OPEN and CLOSE are around what the assistant writes.
_CHATML_LOOP = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}OPEN{{ message.content + '<|im_end|>\n' }}CLOSE"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are of help.<|im_end|>\n{% endif %}" + _CHATML_LOOP
)
_BRACKETS = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        OPEN{{- ' ' + message['content'] + eos_token }}CLOSE
    {%- endif %}
{%- endfor %}
"""
_HEADERS = """{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') %}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\n\n' }}
    {%- if message['role'] == 'system' %}{{- 'Today: ' + date + '\n\n' }}{%- endif %}
    {%- if message['role'] == 'assistant' %}
        OPEN{{- message['content'] | trim + '<|eot|>' }}CLOSE
    {%- else %}
        {{- message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\n\n' }}
{%- endif %}
"""
_PLAIN_WORDS = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:' }}OPEN{{ ' ' + message['content'] + eos_token }}CLOSE"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_TURNS = """{{ bos_token }}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<turn>' + role + '\n' }}
{%- if role == 'model' %}OPEN{{- message.content | trim + '</turn>\n' }}CLOSE{%- else %}
{{- message.content | trim + '</turn>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\n' }}{%- endif %}
"""
_THINKING = """{%- set state = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set state.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        OPEN
        {%- if loop.index0 > state.last %}
            {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content + '<|im_end|>\n' }}CLOSE
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}OPEN{{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
            {{- '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}CLOSE
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
_INDENTED_JSON = """{% for message in messages %}
    {% if loop.index0 > 100 %}
        {% break %}
    {% endif %}
{{ message.role }}={% if message.role == 'assistant' %}OPEN{{ message.content | tojson(indent=2) }};CLOSE
{% else %}
{{ message.content | tojson }};
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
assistant={% endif %}
"""
_TEMPLATES = {
    "chatml": _CHATML_LOOP,
    "chatml, a default system message": _CHATML_DEFAULT_SYSTEM,
    "brackets": _BRACKETS,
    "headers and a date": _HEADERS,
    "plain words": _PLAIN_WORDS,
    "turns of a model": _TURNS,
    "reasoning of the last answer": _THINKING,
    "tools": _TOOLS,
    "json": _INDENTED_JSON,
}
MARKED = {
    name: text.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
    for name, text in _TEMPLATES.items()
}
UNMARKED = {
    name: text.replace("OPEN", "{% if true %}").replace("CLOSE", "{% endif %}") for name, text in _TEMPLATES.items()
}

_WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
_QUESTION = {"role": "user", "content": 'What is two and two, and is <b>it</b> "même"?'}
_ANSWER = {"role": "assistant", "content": "Four.\n\nIndeed: 漢字, é."}
CONVERSATIONS = {
    "one turn": {"messages": [_QUESTION, _ANSWER]},
    "several turns": {
        "messages": [
            _QUESTION,
            _ANSWER,
            {"role": "user", "content": "def f(x): pass"},
            _ANSWER | {"content": "Yes, f."},
        ]
    },
    "system": {"messages": [{"role": "system", "content": "Be short."}, _QUESTION, _ANSWER]},
    "reasoning": {
        "messages": [
            _QUESTION,
            _ANSWER | {"reasoning_content": "Counting."},
            {"role": "user", "content": "And three?"},
            {"role": "assistant", "content": "Five.", "reasoning_content": "One more."},
        ]
    },
    "tools": {
        "tools": [_WEATHER],
        "messages": [
            {"role": "user", "content": "The weather in Köln?"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
            },
            {"role": "tool", "content": '{"sky": "grey"}'},
            {"role": "assistant", "content": "It is grey.", "name": None},
        ],
    },
}


def takes(template: str, conversation: str) -> bool:
    """Whether a template of this kind is made for such a conversation."""
    if template == "brackets":
        return conversation in ("one turn", "several turns")
    return conversation != "tools" or template == "tools"
