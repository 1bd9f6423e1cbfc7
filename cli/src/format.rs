//! `--format`: what Docker users write, a template of Go: fields, `json`, `join`, `upper`, `lower`, `len`, `index`, `println`,
//! `range`, `if`, `else`, `end`, and `table` before it.
//!
//! The crates that read such templates print lists and maps otherwise than Go does.

use anyhow::{Context, bail};
use serde_json::Value;

/// The field that holds labels by their names, for `.Label "NAME"`.
pub const LABEL: &str = "Label";

/// A template.
pub struct Format {
    nodes: Vec<Node>,
    table: bool,
}

enum Node {
    Text(String),
    Show(Expression),
    Range(Expression, Vec<Node>, Vec<Node>),
    If(Expression, Vec<Node>, Vec<Node>),
}

/// Commands, each of which gets what the one before gives as its last argument.
struct Expression(Vec<Vec<Word>>);

#[derive(Clone)]
enum Word {
    /// `.A.B`, or `.`.
    Field(Vec<String>),
    Text(String),
    Number(i64),
    Function(String),
}

impl Format {
    /// Reads a template. `\t` and `\n` are what they are in Docker.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let what = || format!("the format {text:?} cannot be read");
        let (table, body) = match text.strip_prefix("table ") {
            Some(body) => (true, body),
            None => (false, text),
        };
        let body = body.replace("\\t", "\t").replace("\\n", "\n");
        let mut tokens = tokens(&body).with_context(what)?.into_iter();
        let (nodes, end) = nodes(&mut tokens).with_context(what)?;
        if end.is_some() {
            return Err(anyhow::anyhow!("an `end` or `else` has no beginning")).with_context(what);
        }
        Ok(Self { nodes, table })
    }

    /// Prints rows, one a line; as a table, under headings.
    pub fn print(&self, headings: &Value, rows: &[Value]) -> anyhow::Result<()> {
        if self.table {
            let mut lines = vec![self.render(headings)?];
            for row in rows {
                lines.push(self.render(row)?);
            }
            let mut cells = lines
                .iter()
                .map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>());
            let first = cells.next().unwrap_or_default();
            let headings: Vec<&str> = first.iter().map(String::as_str).collect();
            crate::output::table(&headings, &cells.collect::<Vec<_>>());
            return Ok(());
        }
        for row in rows {
            println!("{}", self.render(row)?);
        }
        Ok(())
    }

    /// The template with the values of a row.
    pub fn render(&self, row: &Value) -> anyhow::Result<String> {
        let mut text = String::new();
        render(&self.nodes, row, &mut text)?;
        Ok(text)
    }
}

enum Token {
    Text(String),
    Action(String),
}

/// Text and actions; `{{-` and `-}}` take blanks away.
fn tokens(text: &str) -> anyhow::Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text;
    let mut trim = false;
    while !rest.is_empty() {
        let (before, action) = match rest.split_once("{{") {
            Some((before, after)) => {
                let (action, behind) = after.split_once("}}").context("an action has no }}")?;
                rest = behind;
                (before, Some(action))
            }
            None => (std::mem::take(&mut rest), None),
        };
        let before = if trim { before.trim_start() } else { before };
        let starts = action.and_then(|action| action.strip_prefix("- "));
        let before = if starts.is_some() {
            before.trim_end()
        } else {
            before
        };
        tokens.push(Token::Text(before.to_owned()));
        let Some(action) = action else { break };
        let action = starts.unwrap_or(action);
        let ends = action.strip_suffix(" -");
        trim = ends.is_some();
        tokens.push(Token::Action(ends.unwrap_or(action).trim().to_owned()));
    }
    Ok(tokens)
}

/// Nodes up to the end or an `end` or `else`, which is the second result.
fn nodes(tokens: &mut std::vec::IntoIter<Token>) -> anyhow::Result<(Vec<Node>, Option<String>)> {
    let mut found = Vec::new();
    while let Some(token) = tokens.next() {
        let action = match token {
            Token::Text(text) => {
                found.push(Node::Text(text));
                continue;
            }
            Token::Action(action) => action,
        };
        let (word, rest) = action.split_once(' ').unwrap_or((&action, ""));
        match word {
            "end" | "else" => return Ok((found, Some(word.to_owned()))),
            "range" | "if" => {
                let expression = expression(rest)?;
                let (body, end) = nodes(tokens)?;
                let (other, end) = match end.as_deref() {
                    Some("else") => nodes(tokens)?,
                    _ => (Vec::new(), end),
                };
                if end.as_deref() != Some("end") {
                    bail!("`{word}` has no `end`");
                }
                found.push(match word {
                    "range" => Node::Range(expression, body, other),
                    _ => Node::If(expression, body, other),
                });
            }
            _ => found.push(Node::Show(expression(&action)?)),
        }
    }
    Ok((found, None))
}

fn expression(text: &str) -> anyhow::Result<Expression> {
    let mut commands = vec![Vec::new()];
    let mut rest = text.trim();
    while let Some(first) = rest.chars().next() {
        let (word, length) = match first {
            '|' => {
                commands.push(Vec::new());
                rest = rest.get(1..).unwrap_or_default().trim_start();
                continue;
            }
            '"' => {
                let end = rest
                    .get(1..)
                    .and_then(|rest| rest.find('"'))
                    .context("a text has no end")?;
                (
                    Word::Text(rest.get(1..=end).unwrap_or_default().to_owned()),
                    end + 2,
                )
            }
            _ => {
                let length = rest.find([' ', '|']).unwrap_or(rest.len());
                let word = rest.get(..length).unwrap_or_default();
                (plain(word)?, length)
            }
        };
        if let Some(command) = commands.last_mut() {
            command.push(word);
        }
        rest = rest.get(length..).unwrap_or_default().trim_start();
    }
    if commands.iter().any(Vec::is_empty) {
        bail!("an action is empty");
    }
    Ok(Expression(commands))
}

fn plain(word: &str) -> anyhow::Result<Word> {
    let is_name = |name: &str| {
        !name.is_empty()
            && name
                .chars()
                .all(|character| character.is_ascii_alphanumeric() || character == '_')
    };
    if let Some(path) = word.strip_prefix('.') {
        let parts: Vec<String> = path
            .split('.')
            .filter(|_| !path.is_empty())
            .map(str::to_owned)
            .collect();
        if parts.iter().all(|part| is_name(part)) {
            return Ok(Word::Field(parts));
        }
    } else if let Ok(number) = word.parse() {
        return Ok(Word::Number(number));
    } else if is_name(word) {
        return Ok(Word::Function(word.to_owned()));
    }
    bail!("`{word}` is not known here")
}

fn render(nodes: &[Node], dot: &Value, text: &mut String) -> anyhow::Result<()> {
    for node in nodes {
        match node {
            Node::Text(plain) => text.push_str(plain),
            Node::Show(expression) => text.push_str(&shown(&evaluate(expression, dot)?)),
            Node::If(condition, body, other) => {
                let body = if is_true(&evaluate(condition, dot)?) {
                    body
                } else {
                    other
                };
                render(body, dot, text)?;
            }
            Node::Range(list, body, other) => {
                let items: Vec<Value> = match evaluate(list, dot)? {
                    Value::Array(items) => items,
                    Value::Object(map) => map.into_iter().map(|(_, value)| value).collect(),
                    _ => Vec::new(),
                };
                if items.is_empty() {
                    render(other, dot, text)?;
                }
                for item in &items {
                    render(body, item, text)?;
                }
            }
        }
    }
    Ok(())
}

fn evaluate(expression: &Expression, dot: &Value) -> anyhow::Result<Value> {
    let mut piped: Option<Value> = None;
    for command in &expression.0 {
        let mut words = command.iter();
        let Some(first) = words.next() else {
            bail!("an action is empty")
        };
        let mut arguments = Vec::new();
        for word in words {
            arguments.push(value(word, dot)?);
        }
        arguments.extend(piped.take());
        piped = Some(match first {
            Word::Function(name) => call(name, &arguments)?,
            other if arguments.is_empty() => value(other, dot)?,
            // Docker's only method with an argument: `.Label "NAME"`.
            Word::Field(path) if path.last().is_some_and(|name| name == LABEL) => {
                let labels = value(first, dot)?;
                match arguments.as_slice() {
                    [Value::String(name)] => labels.get(name).cloned().unwrap_or_else(|| "".into()),
                    _ => bail!("a label is asked for as .Label \"NAME\""),
                }
            }
            _ => bail!("what is no function has no arguments"),
        });
    }
    piped.context("an action is empty")
}

fn value(word: &Word, dot: &Value) -> anyhow::Result<Value> {
    Ok(match word {
        Word::Text(text) => text.as_str().into(),
        Word::Number(number) => (*number).into(),
        Word::Function(name) => call(name, &[])?,
        Word::Field(path) => {
            let mut found = dot;
            for part in path {
                found = match found {
                    Value::Object(map) => map
                        .get(part)
                        .with_context(|| format!("there is no field {part}: there are {}", keys(map)))?,
                    Value::Null => &Value::Null,
                    _ => bail!("there is no field {part} in {}", shown(found)),
                };
            }
            found.clone()
        }
    })
}

fn keys(map: &serde_json::Map<String, Value>) -> String {
    map.keys().cloned().collect::<Vec<_>>().join(", ")
}

fn call(name: &str, arguments: &[Value]) -> anyhow::Result<Value> {
    Ok(match (name, arguments) {
        ("json", [value]) => value.to_string().into(),
        ("upper", [value]) => shown(value).to_uppercase().into(),
        ("lower", [value]) => shown(value).to_lowercase().into(),
        ("println", values) => (values.iter().map(shown).collect::<Vec<_>>().join(" ") + "\n").into(),
        ("len", [value]) => match value {
            Value::Array(items) => items.len(),
            Value::Object(map) => map.len(),
            Value::String(text) => text.len(),
            _ => 0,
        }
        .into(),
        // Go's own order is the list first; through a pipe it comes last.
        ("join", [Value::Array(items), Value::String(by)] | [Value::String(by), Value::Array(items)]) => {
            items.iter().map(shown).collect::<Vec<_>>().join(by).into()
        }
        ("index", [Value::Array(items), Value::Number(at)]) => {
            let at = at.as_u64().and_then(|at| usize::try_from(at).ok());
            at.and_then(|at| items.get(at))
                .with_context(|| format!("a list of {} has no such item", items.len()))?
                .clone()
        }
        ("index", [Value::Object(map), Value::String(key)]) => {
            map.get(key).cloned().unwrap_or_else(|| "".into())
        }
        _ => bail!("`{name}` is not known here, or not with such arguments"),
    })
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(is) => *is,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// A value as Go prints it.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".into(),
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(" ")),
        Value::Object(map) => {
            let pairs: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{key}:{}", shown(value)))
                .collect();
            format!("map[{}]", pairs.join(" "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(format: &str) -> anyhow::Result<String> {
        Format::parse(format)?.render(&serde_json::json!({
            "Repository": "debian", "Tag": "12", "Size": 5, "None": null, "Label": {"a.b": "1"},
            "Config": {"Cmd": ["sh", "-c"], "Labels": {"a": "1", "b": "2"}, "Empty": []},
        }))
    }

    #[test]
    fn templates_print_what_docker_would() {
        for (format, expected) in [
            ("{{.Repository}}:{{.Tag}}", "debian:12"),
            ("{{ .Config.Cmd }}\\t{{.Size}}", "[sh -c]\t5"),
            ("{{json .Config.Cmd}}", r#"["sh","-c"]"#),
            ("{{.Config.Cmd | json}}", r#"["sh","-c"]"#),
            ("{{.Config.Labels}}", "map[a:1 b:2]"),
            ("{{index .Config.Cmd 1}}{{index .Config.Labels \"b\"}}", "-c2"),
            ("{{join .Config.Cmd \", \"}}", "sh, -c"),
            ("{{range .Config.Cmd}}<{{.}}>{{else}}none{{end}}", "<sh><-c>"),
            ("{{range .Config.Empty}}x{{else}}none{{end}}", "none"),
            ("{{if .Config.Empty}}x{{else}}{{upper .Tag}}{{end}}", "12"),
            ("a {{- .Tag -}} b", "a12b"),
            ("{{len .Config.Cmd}} {{.None}} {{.None.Deeper}}", "2 <nil> <nil>"),
            ("{{println .Tag}}", "12\n"),
            ("{{.Label \"a.b\"}}{{.Label \"c\"}}", "1"),
        ] {
            assert_eq!(rendered(format).unwrap(), expected, "{format}");
        }
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (format, reason) in [
            ("{{.Repository", "}}"),
            ("{{.Nothing}}", "Repository"),
            ("{{range .Config.Cmd}}", "end"),
            ("{{end}}", "beginning"),
            ("{{nothing .Tag}}", "nothing"),
            ("{{}}", "empty"),
            ("{{index .Config.Cmd 5}}", "no such item"),
        ] {
            let error = format!("{:#}", rendered(format).unwrap_err());
            assert!(error.contains(reason), "{format}: {error}");
        }
    }
}
