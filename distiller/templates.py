"""Prompt files: Jinja2 templates a user can edit, each rendered into one user message.

The environment is sandboxed (a prompt file is data, not code) and strict (an unknown variable is an error, never an
empty string). What is filled in is not rendered again, so braces in a response stay braces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment


class PromptError(RuntimeError):
    """A prompt file cannot be used; the message names the file and the variable or line. It concerns every row, so it
    ends the run."""


@dataclass(frozen=True)
class PromptTemplate:
    path: str
    sha256: str
    """Of the file's bytes; part of the manifest."""
    template: jinja2.Template
    variables: tuple[str, ...]

    @cached_property
    def instructions(self) -> str:
        """The prompt's own words: its text with nothing filled in; "" of one that cannot do without."""
        try:
            return self.render(**dict.fromkeys(self.variables, ""))
        except PromptError:
            return ""

    def render(self, **values: object) -> str:
        """The prompt's text. Raises PromptError."""
        try:
            return self.template.render(**values)
        except (jinja2.TemplateError, TypeError) as fault:
            raise PromptError(f"prompt file {self.path}: {fault}") from fault


def load_prompt(path: str | Path, variables: Iterable[str]) -> PromptTemplate:
    """Read a prompt file that may use the given variables. Raises PromptError for a missing file, a syntax error or
    another variable."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise PromptError(f"prompt file {path} cannot be read: {fault}") from fault
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        unknown = find_undeclared_variables(environment.parse(text)) - set(variables)
        template = environment.from_string(text)
    except jinja2.TemplateSyntaxError as fault:
        raise PromptError(f"prompt file {path}, line {fault.lineno}: {fault.message}") from fault
    if unknown:
        raise PromptError(
            f"prompt file {path} uses {', '.join(f'`{name}`' for name in sorted(unknown))}; "
            f"it may use {', '.join(f'`{name}`' for name in sorted(variables))}"
        )
    return PromptTemplate(str(path), hashlib.sha256(data).hexdigest(), template, tuple(variables))


def conversation_text(messages: list[dict]) -> str:
    """A conversation as text for a teacher prompt: a single user message is its content, several are headed by their
    roles."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
