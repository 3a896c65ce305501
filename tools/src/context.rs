//! From the global options to what a verb works on: the configuration, this node, one mirror.

use crate::client::Client;
use crate::options::Place;
use mirror_core::config::{Config, MAX_CONFIG, Mirror, Node, Side};
use mirror_core::error::{ErrorId, Refusal};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A checked configuration and the node this command is about.
#[derive(Debug)]
pub struct Context {
    /// The whole configuration.
    pub config: Config,
    /// This node's name, known to be in the configuration.
    node: String,
}

impl Context {
    /// Reads the configuration and finds this node in it.
    pub fn load(place: &Place) -> Result<Context, Refusal> {
        let config = read_config(&place.config)?;
        let node = match &place.node {
            Some(name) => known_node(&config, name, "correct --node or KAGAMI_NODE")?,
            None => node_of_host(&config)?,
        };
        Ok(Context { config, node })
    }

    /// This node.
    pub fn node(&self) -> &Node {
        self.config
            .node(&self.node)
            .expect("the node was looked up in this configuration")
    }

    /// The mirror named, or the only one that this node keeps.
    pub fn mirror(&self, name: Option<&str>) -> Result<&Mirror, Refusal> {
        let node = &self.node;
        let ours = || {
            self.config
                .mirrors
                .iter()
                .filter(|it| it.sides_of(node).is_some())
        };
        let names = || {
            ours()
                .map(|it| it.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let unknown = |message: String| Refusal::new(ErrorId::UnknownMirror, message);
        if let Some(name) = name {
            return match self.config.mirror(name) {
                Some(mirror) if mirror.sides_of(node).is_some() => Ok(mirror),
                Some(mirror) => {
                    let [a, b] = mirror.sides.each_ref().map(|side| &side.node);
                    Err(unknown(format!(
                        "mirror `{name}` joins `{a}` and `{b}`, not this node `{node}`; run this \
                         there, or pass --node"
                    )))
                }
                None => Err(unknown(format!(
                    "there is no mirror `{name}` in the configuration; this node keeps: {}",
                    names()
                ))),
            };
        }
        let mut all = ours();
        match (all.next(), all.next()) {
            (Some(only), None) => Ok(only),
            (None, _) => Err(unknown(format!(
                "node `{node}` keeps no mirror; add a [[mirror]] whose `disk` names it"
            ))),
            _ => Err(unknown(format!(
                "node `{node}` keeps several mirrors; name one of: {}",
                names()
            ))),
        }
    }

    /// This node's side of a mirror that [`Context::mirror`] gave.
    pub fn side<'m>(&self, mirror: &'m Mirror) -> &'m Side {
        let (side, _) = mirror
            .sides_of(&self.node)
            .expect("this node keeps the mirror");
        side
    }

    /// A connection to this node's daemon.
    pub fn client(&self) -> Result<Client, Refusal> {
        Client::connect(self.node())
    }
}

/// Reads and checks a configuration file.
pub fn read_config(path: &Path) -> Result<Config, Refusal> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_CONFIG as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| {
            let path = path.display();
            let what = format!("{path}: {error}; pass --config FILE or set KAGAMI_CONFIG");
            Refusal::new(ErrorId::ConfigUnreadable, what)
        })?;
    Config::parse_bytes(&bytes, path)
}

/// The node called like this host.
fn node_of_host(config: &Config) -> Result<String, Refusal> {
    let host = nix::unistd::gethostname().unwrap_or_default();
    let host = host.to_string_lossy();
    let name = config.node_of_host(&host).map_or(&*host, |node| &node.name);
    known_node(
        config,
        name,
        "this host's name is none of them, so pass --node or set KAGAMI_NODE",
    )
}

fn known_node(config: &Config, name: &str, remedy: &str) -> Result<String, Refusal> {
    if config.node(name).is_some() {
        return Ok(name.to_owned());
    }
    let names: Vec<&str> = config.nodes.iter().map(|node| node.name.as_str()).collect();
    Err(Refusal::new(
        ErrorId::UnknownNode,
        format!(
            "there is no node `{name}`, only {}; {remedy}",
            names.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: &str = r#"
[cluster]
name = "c"
insecure = true
[[node]]
name = "a"
addresses = ["127.0.0.1"]
[[node]]
name = "b"
addresses = ["127.0.0.2"]
[[node]]
name = "c"
addresses = ["127.0.0.3"]
[[node]]
name = "d"
addresses = ["127.0.0.4"]
[[mirror]]
name = "r0"
port = 7790
disk = { a = "/a0", b = "/b0" }
[[mirror]]
name = "r1"
port = 7791
disk = { b = "/b1", c = "/c1" }
"#;

    fn on(node: &str) -> Context {
        let config = Config::parse(THREE, Path::new("k")).unwrap();
        Context {
            config,
            node: node.to_owned(),
        }
    }

    #[test]
    fn the_only_mirror_needs_no_name() {
        assert_eq!(on("a").mirror(None).unwrap().name, "r0");
        assert_eq!(on("c").mirror(None).unwrap().name, "r1");
        assert_eq!(on("b").mirror(Some("r1")).unwrap().name, "r1");
        let context = on("b");
        assert_eq!(
            context.side(context.mirror(Some("r1")).unwrap()).disk,
            Path::new("/b1")
        );
    }

    #[test]
    fn a_mirror_that_is_not_clear() {
        for (node, mirror, part) in [
            ("b", None, "r0, r1"),
            ("d", None, "keeps no mirror"),
            ("a", Some("r1"), "joins `b` and `c`"),
            ("a", Some("r9"), "this node keeps: r0"),
        ] {
            let refusal = on(node).mirror(mirror).unwrap_err();
            assert_eq!(refusal.id, ErrorId::UnknownMirror);
            assert!(refusal.message.contains(part), "{refusal}");
        }
    }

    #[test]
    fn a_file_that_is_not_there() {
        let refusal = read_config(Path::new("/nonexistent/k.toml")).unwrap_err();
        assert_eq!(refusal.id, ErrorId::ConfigUnreadable);
    }

    #[test]
    fn a_node_that_is_not_there() {
        let refusal = known_node(&on("a").config, "z", "do it").unwrap_err();
        assert_eq!(refusal.id, ErrorId::UnknownNode);
        assert!(refusal.message.contains("only a, b, c, d; do it"));
    }
}
