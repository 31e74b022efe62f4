"""Compare a stub with its compiled module, and list the differences."""

import ast
import inspect
import re

# Python sees the rest of `__cinit__` and `__init__` only in a docstring, which misplaces the "*".
CLASS = re.compile(r"^(?:cdef )?class (\w+)")
MAKER = re.compile(r"^    def (__init__|__cinit__)\(self(?:, )?(.*?)\):\n", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:from [\w.]+ )?import (\([^)]*\)|[^\n#]*)", re.MULTILINE)
SHOWN = {"__enter__", "__exit__", "__iter__", "__len__"}  # of the special methods
NOTHING = inspect.Parameter.empty


def is_public(name):
    return not name.startswith("_") or name in SHOWN


def shape(arguments, without_self=False):
    """[(name, kind, default)] of an `ast.arguments`; a default "..." or not a literal becomes `...`."""

    def value(node):
        if node is None:
            return NOTHING
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ...

    plain = [*((a, "by position") for a in arguments.posonlyargs), *((a, "either") for a in arguments.args)]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    found = [(a.arg, kind, value(node)) for (a, kind), node in zip(plain, defaults, strict=True)]
    del found[: int(without_self)]
    if arguments.vararg:
        found.append((arguments.vararg.arg, "*", NOTHING))
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [(a.arg, "by keyword", value(node)) for a, node in keywords]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, "**", NOTHING))
    return found


def shape_of(function, without_self=False):
    """The same for a function object."""
    kinds = inspect.Parameter
    names = {
        kinds.POSITIONAL_ONLY: "by position",
        kinds.POSITIONAL_OR_KEYWORD: "either",
        kinds.VAR_POSITIONAL: "*",
        kinds.KEYWORD_ONLY: "by keyword",
        kinds.VAR_KEYWORD: "**",
    }
    parameters = list(inspect.signature(function).parameters.values())[int(without_self) :]
    return [(p.name, names[p.kind], NOTHING if p.default is p.empty else p.default) for p in parameters]


def agree(stub, real):
    """Whether the parameters agree. A stub may give a default as "...", but must not omit it."""
    return len(stub) == len(real) and all(
        (a, b) == (c, d) and (x is y or (NOTHING not in (x, y) and (x is ... or y is ... or same(x, y))))
        for (a, b, x), (c, d, y) in zip(stub, real, strict=True)
    )


def same(one, other):
    return type(one) is type(other) and one == other


def c_parameter(text):
    """A Cython parameter in Python syntax: without C type and `not None`."""
    declared, equals, default = text.strip().partition("=")
    return declared.replace("not None", "").split()[-1] + equals + default


class Source:
    """Facts that only the .pyx has, not its compiled module."""

    def __init__(self, text):
        self.makers = {}
        for part in re.split(r"^(?=(?:cdef )?class )", text, flags=re.MULTILINE)[1:]:
            found = {match[1]: match[2] for match in MAKER.finditer(part)}
            parameters = found.get("__init__", found.get("__cinit__"))
            if parameters is None:
                continue
            written = ", ".join(map(c_parameter, parameters.split(","))) if parameters else ""
            (function,) = ast.parse(f"def maker({written}): pass").body
            # Arguments that a __cinit__ ignores are for the __init__ of a subclass.
            rest = {"*", "**"} if "__init__" not in found else set()
            self.makers[CLASS.match(part)[1]] = [p for p in shape(function.args) if p[1] not in rest]
        self.imported = {
            piece.split()[-1]
            for names in IMPORT.findall(text)
            for piece in names.strip("()").replace("\n", " ").split(",")
            if piece.strip()
        }


class Stub:
    """The classes, functions and other names of a .pyi (or the members of one class of it)."""

    def __init__(self, body):
        self.classes, self.functions, self.values = {}, {}, set()
        for node in body:
            match node:
                case ast.ClassDef() if not any("Protocol" in ast.unparse(base) for base in node.bases):
                    self.classes[node.name] = ClassStub(node)
                case ast.FunctionDef() if "property" in map(ast.unparse, node.decorator_list):
                    self.values.add(node.name)
                case ast.FunctionDef():
                    self.functions[node.name] = node
                case ast.AnnAssign():
                    self.values.add(node.target.id)

    @property
    def names(self):
        return {*self.classes, *self.functions, *self.values}


class ClassStub(Stub):
    def __init__(self, node):
        super().__init__(node.body)
        self.is_record = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        self.is_record |= any("NamedTuple" in ast.unparse(base) for base in node.bases)
        self.fields = [
            (item.target.id, "either", NOTHING if item.value is None else ast.literal_eval(item.value))
            for item in node.body
            if isinstance(item, ast.AnnAssign)
        ]

    @property
    def maker(self):
        """The parameters of the constructor; None if a base class has them."""
        if "__init__" in self.functions:
            return shape(self.functions["__init__"].args, without_self=True)
        return self.fields if self.is_record else None


def is_static(node):
    return "staticmethod" in map(ast.unparse, node.decorator_list)


def record_shape(kind):
    """The constructor of a dataclass or a named tuple. For a cdef class only its docstring tells it."""
    try:
        return shape_of(kind)
    except ValueError:
        (function,) = ast.parse(f"def {kind.__doc__.partition(chr(10))[0]}: pass").body
        return shape(function.args)


def class_differences(name, stub, kind, source):
    members = vars(kind)
    inherited = {member for base in kind.__mro__[1:] for member in vars(base)}
    fields = getattr(kind, "__dataclass_fields__", {})  # those without a default are in no class
    real = {member for member in {*members, *fields} if is_public(member)}
    said = {member for member in stub.names if is_public(member)}
    found = [f"{name}.{member}: not in the stub" for member in real - said - inherited]
    found += [f"{name}.{member}: only in the stub" for member in said - real]
    for member, node in stub.functions.items():
        if member.startswith("__") or member not in members:
            continue
        if inspect.isdatadescriptor(members[member]) or is_static(node) != isinstance(
            members[member], staticmethod
        ):
            found.append(f"{name}.{member}: it is no such method")
            continue
        parameters = shape(node.args, without_self=not is_static(node))
        actual = shape_of(members[member], without_self=not is_static(node))
        if not agree(parameters, actual):
            found.append(f"{name}.{member}: {actual}, and in the stub {parameters}")
    methods = {member for member in members if callable(members[member])}
    found += [f"{name}.{member}: a method" for member in stub.values & methods]
    actual = record_shape(kind) if stub.is_record else source.makers.get(name)
    if (actual or []) != (stub.maker or []) and not agree(stub.maker or [], actual or []):
        found.append(f"{name}(): {actual}, and in the stub {stub.maker}")
    return found


def differences(stub_text, source_text, module):
    """The differences between stub and module, one line each."""
    stub, source = Stub(ast.parse(stub_text).body), Source(source_text)
    real = {name for name in vars(module) if is_public(name) and name not in source.imported}
    found = [f"{name}: not in the stub" for name in real - stub.names]
    found += [f"{name}: only in the stub" for name in stub.names if not hasattr(module, name)]
    for name, node in stub.functions.items():
        if name in real and not agree(shape(node.args), actual := shape_of(getattr(module, name))):
            found.append(f"{name}: {actual}, and in the stub {shape(node.args)}")
    for name in stub.classes.keys() & real:
        found += class_differences(name, stub.classes[name], getattr(module, name), source)
    return sorted(found)
