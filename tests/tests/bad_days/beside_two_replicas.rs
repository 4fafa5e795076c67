//! A server that all depend on is killed and restarted under load, RabbitMQ also frozen, with two message
//! services: what was told to a merchant is what happened, and all is finished soon after.

use std::time::{Duration, Instant};

use handfast_servers::{Error, Postgres, RabbitMq};
use handfast_tests::{Engines, Floor, Merchants, Party, Servers, World};

const REPLICA: &str = "replica";
/// Before, during and after a fault there is load.
const MEANWHILE: Duration = Duration::from_secs(2);
/// After one fault, everything is finished within this time.
const FINISHED: Duration = Duration::from_secs(60);

/// One thing after the other is done to a server.
type Steps<S> = [(&'static str, fn(&mut S) -> Result<(), Error>)];

const POSTGRES: &Steps<Postgres> = &[
    ("killed", Postgres::kill),
    ("started again", Postgres::start_again),
    ("stopped", Postgres::stop),
    ("started again", Postgres::start_again),
];
const RABBITMQ: &Steps<RabbitMq> = &[
    ("killed", RabbitMq::kill),
    ("started again", RabbitMq::start_again),
    ("frozen", |server| server.freeze()),
    ("thawed", |server| server.thaw()),
    ("stopped", RabbitMq::stop),
    ("started again", RabbitMq::start_again),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_goes_and_comes_back() {
    let mut world = two_replicas(Servers::own_postgres()).await;
    let server = world.servers.postgres.take().unwrap();
    world.servers.postgres = Some(suffers(&world, server, POSTGRES).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_goes_and_comes_back() {
    let mut world = two_replicas(Servers::own_rabbitmq()).await;
    let server = world.servers.rabbitmq.take().unwrap();
    world.servers.rabbitmq = Some(suffers(&world, server, RABBITMQ).await);
}

async fn two_replicas(servers: Servers) -> World {
    let mut world = World::with_servers(Engines::Production, servers).await;
    world.replicated = true;
    world.start(Party::Service).await;
    world.start_replica(REPLICA).await;
    world.start_all().await;
    world
}

/// Two steps at a time are a fault and its end.
async fn suffers<S: Send + 'static>(world: &World, mut server: S, steps: &Steps<S>) -> S {
    let merchants = Merchants::of(world.payments());
    for fault in steps.chunks(2) {
        let merchants = &merchants;
        let name = fault[0].0;
        let happens = async move {
            tokio::time::sleep(MEANWHILE).await;
            for (what, step) in fault {
                let (what, step) = (*what, *step);
                let done = tokio::task::spawn_blocking(move || {
                    step(&mut server).unwrap_or_else(|error| panic!("{what}: {error}"));
                    server
                });
                server = done.await.unwrap();
                tokio::time::sleep(MEANWHILE).await;
            }
            merchants.stop();
            server
        };
        (server, ()) = tokio::join!(happens, merchants.ask(name));
        // Whoever asked has been told by now, or has gone away.
        let over = Instant::now();
        world.drained_within(FINISHED).await;
        eprintln!("{name}: finished after {:?}", over.elapsed());
    }
    let books = world.drained().await;
    let history = merchants.into_history();
    eprintln!("{:?}, {} repeats", history.outcomes(), books.repeats());
    history.agrees_with(&books);
    books.hold(Floor {
        paid: 200,
        refused: 50,
        ..Floor::default()
    });
    server
}
