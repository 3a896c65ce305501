//! From a document's tables to a checked [`Config`]: each value first, then how they fit together.

use super::document::{Document, PerNode, TOP, Table, Value};
use super::taken::{Claim, Taken};
use super::units::{excerpt, parse_duration, parse_size};
use super::{
    Config, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, IoBackend, MAX_STALL_TIMEOUT, MIN_STALL_TIMEOUT,
    Metadata, Mirror, NbdAddress, Node, Side,
};
use crate::error::{ErrorId, Refusal};
use crate::limits::{DEFAULT_STALL_TIMEOUT, MIN_COPY_RATE};
use crate::types::CopyRates;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;
use toml::Spanned;
use toml::de::DeTable;

/// The longest path of a Unix socket, in bytes: `sun_path` without its terminating zero.
const MAX_SOCKET_PATH: usize = 107;

pub(super) fn config(doc: Document<'_>, tree: &Spanned<DeTable<'_>>) -> Result<Config, Refusal> {
    let known = ["cluster", "node", "mirror"];
    let top = Table::new(doc, tree.get_ref(), tree.span(), TOP.to_owned(), &known)?;
    let cluster = top.required("cluster", "{ name = \"branch7\", insecure = true }")?;
    let cluster = cluster.table(&["name", "insecure"])?;
    let cluster_name = name(&cluster.required("name", "\"branch7\"")?)?;
    let insecure = insecure(doc, &cluster)?;

    let mut taken = Taken::new(doc);
    let mut nodes = Vec::new();
    for value in top.tables("node")? {
        nodes.push(node(&value, &mut taken)?);
    }
    if nodes.is_empty() {
        let missing = "there is no [[node]]; add one for each of the two servers";
        return Err(doc.refuse(cluster.at(), ErrorId::ConfigSyntax, missing));
    }
    let mut mirrors = Vec::new();
    for value in top.tables("mirror")? {
        mirrors.push(mirror(doc, &value, &nodes, &mut taken)?);
    }
    Ok(Config {
        cluster: cluster_name,
        insecure,
        nodes,
        mirrors,
    })
}

/// Links are in plain text until keys exist; whoever runs them so has to say it.
fn insecure(doc: Document<'_>, cluster: &Table<'_>) -> Result<bool, Refusal> {
    const WHY: &str = "TLS comes in a later version, links are in plain text until then; \
        to accept that on a network you trust, write insecure = true";
    match cluster.optional("insecure") {
        Some(value) if value.boolean()? => Ok(true),
        Some(value) => Err(value.refuse(ErrorId::ConfigReserved, WHY)),
        None => Err(doc.refuse(
            cluster.at(),
            ErrorId::ConfigReserved,
            format!("[cluster] does not say `insecure`: {WHY}"),
        )),
    }
}

const NODE_KEYS: [&str; 5] = ["name", "addresses", "run-dir", "state-dir", "io-backend"];

fn node(value: &Value<'_>, taken: &mut Taken<'_>) -> Result<Node, Refusal> {
    let table = value.table(&NODE_KEYS)?;
    let name_value = table.required("name", "\"a\"")?;
    let name = name(&name_value)?;
    taken.claim(Claim::Node(name.clone()), name_value.at(), || {
        format!("node `{name}` is defined twice")
    })?;
    let list = table.required("addresses", "[\"192.0.2.1\"]")?;
    let mut addresses = Vec::new();
    for item in list.array()? {
        let address = address(&item)?;
        if addresses.contains(&address) {
            let twice = format!("{address} is listed twice; remove one");
            return Err(item.refuse(ErrorId::ConfigConflict, twice));
        }
        addresses.push(address);
    }
    if addresses.is_empty() {
        let empty = "the list is empty; give at least one address where the peer reaches this node";
        return Err(list.refuse(ErrorId::ConfigValue, empty));
    }
    let run_dir = directory(&table, "run-dir", DEFAULT_RUN_DIR)?;
    let state_dir = directory(&table, "state-dir", DEFAULT_STATE_DIR)?;
    let node = Node {
        name,
        addresses,
        run_dir,
        state_dir,
        io_backend: io_backend(&table)?,
    };
    if node.control_socket().as_os_str().len() > MAX_SOCKET_PATH {
        let at = table.optional("run-dir").unwrap_or(name_value);
        let long = format!(
            "the control socket RUN-DIR/NODE-mirror.sock would be longer than {MAX_SOCKET_PATH} \
             bytes; shorten run-dir"
        );
        return Err(at.refuse(ErrorId::ConfigValue, long));
    }
    Ok(node)
}

const MIRROR_KEYS: [&str; 10] = [
    "name",
    "mode",
    "port",
    "disk",
    "metadata",
    "nbd",
    "device",
    "stall-timeout",
    "resync-max-rate",
    "resync-min-rate",
];

fn mirror(
    doc: Document<'_>,
    value: &Value<'_>,
    nodes: &[Node],
    taken: &mut Taken<'_>,
) -> Result<Mirror, Refusal> {
    let table = value.table(&MIRROR_KEYS)?;
    let name_value = table.required("name", "\"r0\"")?;
    let name = name(&name_value)?;
    taken.claim(Claim::Mirror(name.clone()), name_value.at(), || {
        format!("mirror `{name}` is defined twice")
    })?;
    mode(&table)?;
    device(&table)?;
    let port_value = table.required("port", "7790")?;
    let port = port(&port_value)?;
    let disk = table.required("disk", "{ a = \"/dev/…\", b = \"/dev/…\" }")?;
    let pair = pair(doc, &disk, nodes)?;
    let stall_timeout = stall_timeout(&table)?;
    let copy_rates = copy_rates(&table)?;

    let metadata = table.optional("metadata");
    let nbd = table.optional("nbd");
    for (key, value) in [("metadata", &metadata), ("nbd", &nbd)] {
        if let Some(value) = value {
            only_pair(doc, key, value, pair)?;
        }
    }
    if let Some(shared) = pair[0]
        .addresses
        .iter()
        .find(|it| pair[1].addresses.contains(it))
    {
        let [a, b] = pair.map(|node| &node.name);
        let same = format!(
            "nodes `{a}` and `{b}` of mirror `{name}` share the address {shared}; give each its own"
        );
        return Err(doc.refuse(name_value.at(), ErrorId::ConfigConflict, same));
    }
    for node in pair {
        let link = SocketAddr::new(node.addresses[0], port);
        taken.claim(Claim::Listen(link), port_value.at(), || {
            format!(
                "port {port} on {} (node `{}`) is used twice",
                link.ip(),
                node.name
            )
        })?;
    }
    let mut side = |node: &Node| -> Result<Side, Refusal> {
        let disk_value = of_node(&disk, &node.name)?.unwrap_or_else(|| disk.clone());
        let disk = path(&disk_value)?;
        taken.claim_path(&node.name, &disk, disk_value.at())?;
        let metadata = match &metadata {
            None => Metadata::Internal,
            Some(all) => metadata_of(all, node, taken)?,
        };
        let nbd = match nbd
            .as_ref()
            .map(|nbd| of_node(nbd, &node.name))
            .transpose()?
            .flatten()
        {
            None => None,
            Some(value) => Some(nbd_address(&value, node, taken)?),
        };
        Ok(Side {
            node: node.name.clone(),
            disk,
            metadata,
            nbd,
        })
    };
    let sides = [side(pair[0])?, side(pair[1])?];
    Ok(Mirror {
        name,
        port,
        sides,
        stall_timeout,
        copy_rates,
    })
}

/// The two nodes that keep a mirror: those its `disk` names, or the only two there are. In the
/// order of the `[[node]]` tables.
fn pair<'n>(
    doc: Document<'_>,
    disk: &Value<'_>,
    nodes: &'n [Node],
) -> Result<[&'n Node; 2], Refusal> {
    let entries = match disk.per_node()? {
        PerNode::All(_) => {
            return match nodes {
                [first, second] => Ok([first, second]),
                _ => Err(disk.refuse(
                    ErrorId::ConfigValue,
                    format!(
                        "one disk for all nodes needs exactly two [[node]], there are {}; \
                         write a table that names the two nodes of this mirror",
                        nodes.len()
                    ),
                )),
            };
        }
        PerNode::Each(entries) => entries,
    };
    if let Some(entry) = entries
        .iter()
        .find(|entry| !nodes.iter().any(|node| node.name == entry.node))
    {
        let node = excerpt(entry.node);
        return Err(doc.refuse(
            entry.node_at,
            ErrorId::ConfigConflict,
            format!("there is no [[node]] named `{node}`; add it or correct the name"),
        ));
    }
    let named: Vec<&Node> = nodes
        .iter()
        .filter(|node| entries.iter().any(|entry| entry.node == node.name))
        .collect();
    match named.as_slice() {
        [first, second] => Ok([first, second]),
        _ => Err(disk.refuse(
            ErrorId::ConfigValue,
            format!(
                "a mirror joins two nodes, this names {}; name two",
                named.len()
            ),
        )),
    }
}

fn only_pair(
    doc: Document<'_>,
    key: &str,
    value: &Value<'_>,
    pair: [&Node; 2],
) -> Result<(), Refusal> {
    if let PerNode::Each(entries) = value.per_node()?
        && let Some(entry) = entries
            .iter()
            .find(|entry| !pair.iter().any(|node| node.name == entry.node))
    {
        let [a, b] = pair.map(|node| &node.name);
        let node = excerpt(entry.node);
        return Err(doc.refuse(
            entry.node_at,
            ErrorId::ConfigConflict,
            format!("`{key}` names `{node}`, but `disk` joins `{a}` and `{b}`; name those"),
        ));
    }
    Ok(())
}

/// This node's part of a value: the whole where it is one for all.
fn of_node<'t>(value: &Value<'t>, node: &str) -> Result<Option<Value<'t>>, Refusal> {
    Ok(match value.per_node()? {
        PerNode::All(value) => Some(value),
        PerNode::Each(entries) => entries
            .into_iter()
            .find(|entry| entry.node == node)
            .map(|entry| entry.value),
    })
}

fn metadata_of(all: &Value<'_>, node: &Node, taken: &mut Taken<'_>) -> Result<Metadata, Refusal> {
    let Some(value) = of_node(all, &node.name)? else {
        let missing = format!(
            "nothing for node `{0}`; add {0} = \"internal\" or a path",
            node.name
        );
        return Err(all.refuse(ErrorId::ConfigValue, missing));
    };
    if value.string()? == "internal" {
        return Ok(Metadata::Internal);
    }
    let path = path(&value)?;
    taken.claim_path(&node.name, &path, value.at())?;
    Ok(Metadata::External(path))
}

fn nbd_address(
    value: &Value<'_>,
    node: &Node,
    taken: &mut Taken<'_>,
) -> Result<NbdAddress, Refusal> {
    const FORMS: &str = "write \"unix:/PATH\" or \"tcp:127.0.0.1:PORT\"";
    let text = value.string()?;
    if let Some(socket) = text.strip_prefix("unix:") {
        let path = checked_path(value, socket)?;
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            let long = format!("a socket's path has at most {MAX_SOCKET_PATH} bytes; shorten it");
            return Err(value.refuse(ErrorId::ConfigValue, long));
        }
        taken.claim_path(&node.name, &path, value.at())?;
        return Ok(NbdAddress::Unix(path));
    }
    let Some(address) = text.strip_prefix("tcp:") else {
        let unknown = format!(
            "`{}` is no address of an NBD server; {FORMS}",
            excerpt(text)
        );
        return Err(value.refuse(ErrorId::ConfigValue, unknown));
    };
    let address: SocketAddr = address.parse().map_err(|_| {
        let bad = format!(
            "`{}` is not ADDRESS:PORT with a numeric address; {FORMS}",
            excerpt(text)
        );
        value.refuse(ErrorId::ConfigValue, bad)
    })?;
    if !address.ip().is_loopback() {
        let open = "NBD over TCP is served on loopback addresses only while there is no TLS; \
            use 127.0.0.1 or [::1], or a Unix socket";
        return Err(value.refuse(ErrorId::ConfigValue, open));
    }
    if address.port() == 0 {
        return Err(value.refuse(
            ErrorId::ConfigValue,
            "port 0 is none; choose one from 1 to 65535",
        ));
    }
    // The same loopback address on two nodes is two addresses, unless both run on one host.
    taken.claim(Claim::Nbd(node.name.clone(), address), value.at(), || {
        format!("{address} is used twice on node `{}`", node.name)
    })?;
    if node.addresses.contains(&address.ip()) {
        taken.claim(Claim::Listen(address), value.at(), || {
            format!("{address} is used twice on node `{}`", node.name)
        })?;
    }
    Ok(NbdAddress::Tcp(address))
}

fn mode(table: &Table<'_>) -> Result<(), Refusal> {
    let Some(value) = table.optional("mode") else {
        return Ok(());
    };
    match value.string()? {
        "sync" => Ok(()),
        "async" => Err(value.refuse(
            ErrorId::ConfigReserved,
            "\"async\" is not supported yet; write \"sync\"",
        )),
        other => Err(value.refuse(
            ErrorId::ConfigValue,
            format!("`{}` is no mode; write \"sync\"", excerpt(other)),
        )),
    }
}

fn device(table: &Table<'_>) -> Result<(), Refusal> {
    let Some(value) = table.optional("device") else {
        return Ok(());
    };
    match value.string()? {
        "auto" | "none" => Ok(()),
        later @ ("ublk" | "nbd") => Err(value.refuse(
            ErrorId::ConfigReserved,
            format!("\"{later}\" is not supported yet; write \"auto\" or \"none\""),
        )),
        other => Err(value.refuse(
            ErrorId::ConfigValue,
            format!(
                "`{}` is no kind of device; write \"auto\" or \"none\"",
                excerpt(other)
            ),
        )),
    }
}

fn io_backend(table: &Table<'_>) -> Result<IoBackend, Refusal> {
    let Some(value) = table.optional("io-backend") else {
        return Ok(IoBackend::default());
    };
    match value.string()? {
        "auto" => Ok(IoBackend::Auto),
        "io_uring" => Ok(IoBackend::IoUring),
        "threads" => Ok(IoBackend::Threads),
        other => Err(value.refuse(
            ErrorId::ConfigValue,
            format!(
                "`{}` is no way to do I/O; write \"auto\", \"io_uring\" or \"threads\"",
                excerpt(other)
            ),
        )),
    }
}

fn copy_rates(table: &Table<'_>) -> Result<CopyRates, Refusal> {
    let rates = CopyRates {
        max: copy_rate(table, "resync-max-rate")?,
        min: copy_rate(table, "resync-min-rate")?,
    };
    if let (Some(max), Some(min)) = (rates.max, rates.min)
        && min > max
        && let Some(value) = table.optional("resync-min-rate")
    {
        let text = "it is more than `resync-max-rate`; lower it, or raise that";
        return Err(value.refuse(ErrorId::ConfigConflict, text));
    }
    Ok(rates)
}

/// Bytes per second.
fn copy_rate(table: &Table<'_>, key: &str) -> Result<Option<NonZeroU64>, Refusal> {
    let Some(value) = table.optional(key) else {
        return Ok(None);
    };
    let rate =
        parse_size(value.string()?).map_err(|error| value.refuse(ErrorId::ConfigValue, error))?;
    match NonZeroU64::new(rate) {
        Some(sound) if rate >= MIN_COPY_RATE => Ok(Some(sound)),
        _ => Err(value.refuse(
            ErrorId::ConfigValue,
            "too little for a second; write \"64KiB\" or more, or leave it out",
        )),
    }
}

fn stall_timeout(table: &Table<'_>) -> Result<Duration, Refusal> {
    let Some(value) = table.optional("stall-timeout") else {
        return Ok(DEFAULT_STALL_TIMEOUT);
    };
    let timeout = parse_duration(value.string()?)
        .map_err(|error| value.refuse(ErrorId::ConfigValue, error))?;
    if (MIN_STALL_TIMEOUT..=MAX_STALL_TIMEOUT).contains(&timeout) {
        Ok(timeout)
    } else {
        Err(value.refuse(
            ErrorId::ConfigValue,
            "out of range; choose from \"100ms\" to \"60s\"",
        ))
    }
}

fn port(value: &Value<'_>) -> Result<u16, Refusal> {
    match value.integer()?.map(u16::try_from) {
        Some(Ok(port)) if port != 0 => Ok(port),
        _ => Err(value.refuse(ErrorId::ConfigValue, "out of range; choose from 1 to 65535")),
    }
}

fn name(value: &Value<'_>) -> Result<String, Refusal> {
    let text = value.string()?;
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let fine = !text.is_empty()
        && text.len() <= 63
        && text
            .bytes()
            .all(|byte| letter(byte) || b"_.-".contains(&byte))
        && text.bytes().next().is_some_and(letter);
    if fine {
        return Ok(text.to_owned());
    }
    Err(value.refuse(
        ErrorId::ConfigValue,
        format!(
            "`{}` is no name; use up to 63 of a-z, 0-9, `_`, `.` and `-`, beginning with a letter \
             or digit",
            excerpt(text)
        ),
    ))
}

fn address(value: &Value<'_>) -> Result<IpAddr, Refusal> {
    let text = value.string()?;
    let address: IpAddr = text.parse().map_err(|_| {
        let bad = format!("`{}` is no IP address; write it in numbers", excerpt(text));
        value.refuse(ErrorId::ConfigValue, bad)
    })?;
    if address.is_unspecified() || address.is_multicast() {
        let unfit = format!("{address} is not the address of one node; write its own");
        return Err(value.refuse(ErrorId::ConfigValue, unfit));
    }
    Ok(address)
}

fn directory(table: &Table<'_>, key: &str, default: &str) -> Result<PathBuf, Refusal> {
    table
        .optional(key)
        .map_or_else(|| Ok(PathBuf::from(default)), |value| path(&value))
}

fn path(value: &Value<'_>) -> Result<PathBuf, Refusal> {
    checked_path(value, value.string()?)
}

fn checked_path(value: &Value<'_>, text: &str) -> Result<PathBuf, Refusal> {
    if !text.starts_with('/') {
        let relative = format!(
            "`{}` is not an absolute path; begin it with `/`",
            excerpt(text)
        );
        return Err(value.refuse(ErrorId::ConfigValue, relative));
    }
    if text.chars().any(char::is_control) || text.len() > 4095 {
        let odd = "a path has no control characters and at most 4095 bytes; correct it";
        return Err(value.refuse(ErrorId::ConfigValue, odd));
    }
    Ok(PathBuf::from(text))
}
