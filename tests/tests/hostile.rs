//! Bytes nobody should send, on every port: the daemons live, the mirror goes on.

use kagami_tests::{
    Cluster, ClusterOptions, Deadline, KIB, Ledger, MIB, NbdAddress, NbdClient, NbdCommand, Node,
    ProxyMode, StopOnDrop, WriteLoad, pace, wait_until,
};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A port to attack.
enum Port {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

trait Bytes: Read + Write {}
impl<T: Read + Write> Bytes for T {}

impl Port {
    /// A connection, or an error: not accepting one is an answer, too.
    fn connect(&self) -> io::Result<Box<dyn Bytes>> {
        let patience = Some(Duration::from_millis(50));
        Ok(match self {
            Port::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)?;
                Box::new(stream)
            }
            Port::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)?;
                Box::new(stream)
            }
        })
    }

    /// Sends what may be refused at any byte, and looks whether anything comes back.
    fn throw(&self, bytes: &[u8]) {
        if let Ok(mut stream) = self.connect() {
            let _ = stream.write_all(bytes);
            let _ = stream.read(&mut [0; 512]);
        }
    }
}

fn random_bytes(len: usize) -> Vec<u8> {
    (0..len).map(|_| fastrand::u8(..)).collect()
}

fn attack(port: &Port) {
    for len in [0, 1, 3, 4, 16, 47, 48, 49, 200, 70_000] {
        for _ in 0..4 {
            port.throw(&random_bytes(len));
        }
        port.throw(&vec![0; len]);
        port.throw(&vec![0xff; len]);
    }
    // The largest lengths a field can claim, with nothing behind them.
    for len in [u32::MAX, i32::MAX as u32, 64 << 20, (4 << 20) + 1] {
        port.throw(&len.to_le_bytes());
        port.throw(&len.to_be_bytes());
    }
}

/// The mirror serves, and both replicas are (again) in sync.
fn assert_alive(cluster: &mut Cluster, client: &mut NbdClient, what: &str) {
    for node in Node::BOTH {
        assert!(
            cluster.runs(node),
            "{what} ended the daemon of {}",
            node.name()
        );
    }
    let data = vec![fastrand::u8(..); 64 << 10];
    client.write(MIB, &data, true).expect("the mirror serves");
    assert_eq!(client.read(MIB, 64 << 10).expect("the mirror serves"), data);
    cluster.wait_mirrored();
}

#[test]
fn garbage_on_every_port() {
    let mut cluster = Cluster::mirrored(ClusterOptions {
        disk_size: 64 * MIB,
        ..ClusterOptions::default()
    });
    let mut client = cluster.nbd(Node::A);
    let NbdAddress::Unix(nbd) = cluster.nbd_address(Node::A, 0).clone() else {
        unreachable!("exported on a Unix socket by default")
    };
    for (what, port) in [
        ("the mirror link", Port::Tcp(cluster.link_address(0))),
        ("NBD", Port::Unix(nbd)),
        (
            "the control socket of a",
            Port::Unix(cluster.control_socket(Node::A)),
        ),
        (
            "the control socket of b",
            Port::Unix(cluster.control_socket(Node::B)),
        ),
    ] {
        attack(&port);
        assert_alive(&mut cluster, &mut client, &format!("garbage on {what}"));
        // Connections that say nothing, and stay.
        let idle: Vec<_> = (0..50).flat_map(|_| port.connect()).collect();
        assert_alive(
            &mut cluster,
            &mut client,
            &format!("idle connections on {what}"),
        );
        drop(idle);
    }
    cluster.assert_identical();
}

#[test]
fn broken_nbd_clients() {
    let mut cluster = Cluster::mirrored(ClusterOptions {
        disk_size: 64 * MIB,
        nbd_on_tcp: true,
        ..ClusterOptions::default()
    });
    let mut client = cluster.nbd(Node::A);
    let NbdAddress::Tcp(address) = *cluster.nbd_address(Node::A, 0) else {
        unreachable!("exported on TCP")
    };
    attack(&Port::Tcp(address));
    for _ in 0..20 {
        // Leaves in the middle of everything: requests in flight, half a payload.
        let mut rude = cluster.nbd(Node::A);
        for at in 0..32 {
            rude.send(NbdCommand::Read(256 << 10), at * MIB, &[])
                .unwrap();
            let write = NbdCommand::Write { fua: false };
            rude.send(write, 48 * MIB + at * 64 * KIB, &[1; 65536])
                .unwrap();
        }
        drop(rude);
    }
    // A request that makes no sense ends at most its own connection.
    let mut confused = cluster.nbd(Node::A);
    let sent = confused.send(NbdCommand::Read(u32::MAX), 0, &[]);
    if sent.is_ok() {
        // Refused, or the connection closed: either is an answer.
        let refused = confused.receive().map(|reply| reply.error != 0);
        assert!(refused.unwrap_or(true));
    }
    assert_alive(&mut cluster, &mut client, "broken clients");
    wait_until(
        Deadline::seconds(10),
        "requests of clients that left",
        || {
            let in_flight = cluster.status(Node::A).counters.in_flight;
            if in_flight == 0 {
                Ok(())
            } else {
                Err(format!("{in_flight} in flight"))
            }
        },
    );
    cluster.assert_identical();
}

/// Bits that flip between the nodes, in every kind of frame: noticed, never believed.
#[test]
fn a_link_that_damages_bytes() {
    const LOAD: WriteLoad = WriteLoad {
        first_block: 0,
        blocks: 8 * 1024,
        depth: 16,
        durable_every: 10,
    };
    let mut cluster = Cluster::mirrored(ClusterOptions {
        disk_size: 64 * MIB,
        proxied: true,
        ..ClusterOptions::default()
    });
    let mut ledger = Ledger::default();
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let _ends = StopOnDrop(&stop);
        let load = scope.spawn(|| LOAD.run(cluster.nbd_address(Node::A, 0), &stop, &mut ledger));
        for every in [64 * KIB, MIB, 4 * MIB] {
            cluster.proxy(0).set(ProxyMode::Damage(every));
            pace(Duration::from_secs(2));
        }
        cluster.proxy(0).set(ProxyMode::Forward);
        stop.store(true, Ordering::Relaxed);
        load.join().expect("the load met no error")
    });
    for node in Node::BOTH {
        assert!(cluster.runs(node), "{} was ended", node.name());
    }
    // Each side of a connection may meet the damage; both count the ends of their own.
    let lost = cluster.log_text(Node::A).matches("lost b").count();
    println!(
        "{} writes over a link that damages bytes; the connection was given up {lost} times",
        report.writes
    );
    assert!(!report.lost && lost > 0);
    cluster.wait_mirrored();
    cluster.assert_identical();
    cluster.verify(Node::A, &mut ledger);
}
